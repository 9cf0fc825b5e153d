package service_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
)

// netns makes a network namespace with its loopback up, pinned at path, and a listener in it.
func netns(t *testing.T, path string) net.Listener {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		made <- func() (err error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			lo, err := unix.NewIfreq("lo")
			if err != nil {
				return err
			}
			lo.SetUint16(unix.IFF_UP)
			if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
				return err
			}
			l, err = net.Listen("tcp", "127.0.0.1:0")
			return err
		}()
	}()
	err := <-made
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// refused asks for a checkpoint that criu refuses for want of an option, which the error names; the container goes on.
func (f *fixture) refused(option string) {
	f.t.Helper()
	images := filepath.Join(f.t.TempDir(), "images")
	err := f.checkpoint(images, &options.CheckpointOptions{})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the option "+option+" allows it") {
		f.t.Errorf("without the option: %v", err)
	}
	if _, err := os.Stat(images); !os.IsNotExist(err) {
		f.t.Errorf("the directory of the images: %v", err)
	}
	if st := f.state("").Status; st != tasktypes.Status_RUNNING {
		f.t.Errorf("it is %v", st)
	}
}

// moved saves a container to images, ends it, and restores it in another shim.
func (f *fixture) moved(opts *options.CheckpointOptions, engine, log string, spec *specs.Spec) *fixture {
	f.t.Helper()
	images := filepath.Join(f.t.TempDir(), "images")
	opts.Exit = true
	err := f.checkpoint(images, opts)
	if err != nil && strings.Contains(err.Error(), "Can't get 1:16 opt") {
		f.t.Skip("criu asks a TCP socket for SO_PASSCRED, which Linux 6.16 and later refuse: ", err)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.remove("")
	g := serve(f.t, f.id, spec)
	g.create(func(r *task.CreateTaskRequest) {
		r.Stdout, r.Checkpoint = "file://"+log, images
		r.Options = anyOf(f.t, &options.Options{BinaryName: engine})
	})
	g.start("")
	return g
}

// TestCheckpointTCP: a connection outlives its container's end with open_tcp: what the peer sends meanwhile is there after the
// restore, and the other way works too. Without the option the checkpoint is refused, and the connection goes on.
func TestCheckpointTCP(t *testing.T) {
	needCriu(t)
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) { checkpointTCP(t, engine) })
	}
}

func checkpointTCP(t *testing.T, engine string) {
	dir := t.TempDir()
	l := netns(t, filepath.Join(dir, "netns"))
	log := filepath.Join(dir, "log")
	spec := func() *specs.Spec {
		port := l.Addr().(*net.TCPAddr).Port
		s := shimbin.Spec("cktcp", "sh", "-c", fmt.Sprintf("(while [ ! -e /dev/go ]; do usleep 50000; done; echo back; sleep 1000) | nc 127.0.0.1 %d", port))
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: filepath.Join(dir, "netns")})
		return s
	}
	f := serve(t, "cktcp", spec())
	f.create(func(r *task.CreateTaskRequest) {
		r.Stdout, r.Options = "file://"+log, anyOf(t, &options.Options{BinaryName: engine})
	})
	f.start("")
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = peer.Close() }()
	say := func(n int) {
		t.Helper()
		if _, err := fmt.Fprintf(peer, "line %d\n", n); err != nil {
			t.Fatal(err)
		}
	}
	say(0)
	awaitLines(t, log, 1)
	f.refused("open_tcp")
	say(1)
	awaitLines(t, log, 2)
	said := make(chan error, 1)
	go func() { // it may come before the checkpoint, or while nobody is there
		_, err := fmt.Fprintln(peer, "line 2")
		said <- err
	}()
	g := f.moved(&options.CheckpointOptions{OpenTcp: true}, engine, log, spec())
	if err := <-said; err != nil {
		t.Fatal(err)
	}
	awaitLines(t, log, 3)
	say(3)
	awaitLines(t, log, 4)
	if n := counted(t, log); n != 4 {
		t.Errorf("%d lines", n)
	}
	if s := g.runExec("go", nil, "touch", "/dev/go"); s != 0 {
		t.Fatalf("status %d", s)
	}
	if err := peer.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(peer).ReadString('\n'); err != nil || line != "back\n" {
		t.Errorf("the peer got %q, %v", line, err)
	}
	g.kill("", syscall.SIGKILL)
	g.wait("")
}

// hostFlock is the machine's flock(1) as a command in a container that has the mounts: busybox may have none.
func hostFlock(t *testing.T) (command string, mounts []specs.Mount) {
	t.Helper()
	program, err := exec.LookPath("flock")
	if err != nil {
		t.Fatalf("%v (Debian: util-linux)", err)
	}
	loaders, err := filepath.Glob("/lib/*-linux-gnu/ld-linux*.so*")
	if err != nil || len(loaders) == 0 {
		t.Fatalf("no dynamic loader: %v, %v", loaders, err)
	}
	command = "/dev/hostlib/" + filepath.Base(loaders[0]) + " --library-path /dev/hostlib /dev/flock"
	return command, []specs.Mount{
		{Destination: "/dev/hostlib", Type: "bind", Source: filepath.Dir(loaders[0]), Options: []string{"rbind", "ro"}},
		{Destination: "/dev/flock", Type: "bind", Source: program, Options: []string{"bind", "ro"}},
	}
}

// TestCheckpointLocks: a restored container holds the file locks that it had, with file_locks; without it the checkpoint is refused.
func TestCheckpointLocks(t *testing.T) {
	needCriu(t)
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) {
			flock, mounts := hostFlock(t)
			log := filepath.Join(t.TempDir(), "log")
			spec := func() *specs.Spec {
				s := shimbin.Spec("cklock", "sh", "-c", "exec 3>/dev/lock; "+flock+" 3 && echo line 0; while :; do usleep 50000; done")
				s.Mounts = append(s.Mounts, mounts...)
				return s
			}
			f := serve(t, "cklock", spec())
			f.create(func(r *task.CreateTaskRequest) {
				r.Stdout, r.Options = "file://"+log, anyOf(t, &options.Options{BinaryName: engine})
			})
			f.start("")
			awaitLines(t, log, 1)
			f.refused("file_locks")
			g := f.moved(&options.CheckpointOptions{FileLocks: true}, engine, log, spec())
			if s := g.runExec("try", nil, "sh", "-c", flock+" -n /dev/lock true"); s != 1 {
				t.Errorf("the lock is not held: status %d", s)
			}
			if s := g.runExec("other", nil, "sh", "-c", flock+" -n /dev/other true"); s != 0 {
				t.Errorf("a lock that nobody holds: status %d", s)
			}
			g.kill("", syscall.SIGKILL)
			g.wait("")
		})
	}
}

// TestCheckpointUnixSocket: a datagram socket that is connected to one outside is connected again, with external_unix_sockets; without
// it the checkpoint is refused.
func TestCheckpointUnixSocket(t *testing.T) {
	needCriu(t)
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("/tmp", "ckunix")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = os.RemoveAll(dir) }()
			socket := filepath.Join(dir, "devlog") // criu connects to it by the name that it has outside
			l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			hears := func(what string) {
				t.Helper()
				if err := l.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 1024)
				for {
					n, err := l.Read(b)
					if err != nil {
						t.Fatalf("nothing says %q: %v", what, err)
					}
					if strings.Contains(string(b[:n]), what) {
						return
					}
				}
			}
			spec := func() *specs.Spec {
				s := shimbin.Spec("ckunix", "sh", "-c", "mkdir /dev/cron; ln -s "+socket+" /dev/log; exec crond -f -l 0 -c /dev/cron")
				s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"},
					specs.Mount{Destination: dir, Type: "bind", Source: dir, Options: []string{"bind"}})
				return s
			}
			log := filepath.Join(dir, "log")
			f := serve(t, "ckunix", spec())
			f.create(func(r *task.CreateTaskRequest) {
				r.Stdout, r.Options = "file://"+log, anyOf(t, &options.Options{BinaryName: engine})
			})
			f.start("")
			hears("started")
			f.refused("external_unix_sockets")
			g := f.moved(&options.CheckpointOptions{ExternalUnixSockets: true}, engine, log, spec())
			hears("wakeup")
			g.kill("", syscall.SIGKILL)
			g.wait("")
		})
	}
}
