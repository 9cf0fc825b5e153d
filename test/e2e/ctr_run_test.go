package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/console"

	"github.com/managerd/managerd/test/harness"
)

// patience is how long one command of a client may take on a busy machine.
const patience = 30 * time.Second

// ends runs a command that must not hang.
func ends(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	watch := time.AfterFunc(patience, func() {
		t.Errorf("%s hangs", strings.Join(cmd.Args, " "))
		_ = cmd.Process.Kill()
	})
	defer watch.Stop()
	if err := cmd.Run(); err != nil {
		t.Errorf("%s: %v", strings.Join(cmd.Args, " "), err)
	}
}

// TestCtrRun: run --rm, with what can be asked of a container.
func TestCtrRun(t *testing.T) { eachCtr(t, testCtrRun) }

func testCtrRun(t *testing.T) {
	u := newUser(t)
	run := func(args ...string) string { return u.ctr(append([]string{"run", "--rm"}, args...)...) }
	memory := fmt.Sprint(limit)

	equal(t, "output", run("--memory-limit", memory, ref, "c", "echo", "hello"), "hello\n")
	for _, code := range []int{1, 7, 42, 255} {
		u.fails(code, "run", "--rm", ref, "c", "sh", "-c", fmt.Sprintf("exit %d", code))
	}
	u.fails(128+9, "run", "--rm", ref, "c", "sh", "-c", "kill -9 $$; sleep 1; exec sh -c 'kill -9 $$' & wait $!") // of a child: a pid 1 is immune
	err := u.fails(3, "run", "--rm", ref, "c", "sh", "-c", "echo out; echo err >&2; exit 3")
	has(t, err, "err")
	if strings.Contains(err, "out\n") {
		t.Error("standard output is in standard error")
	}
	equal(t, "environment", run("--env", "A=b c", "--env", "D=", ref, "c", "sh", "-c", `echo "$A,$D,$PATH"`),
		"b c,,/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n")
	equal(t, "cwd", run("--cwd", "/usr/bin", ref, "c", "pwd"), "/usr/bin\n")

	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("of the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	equal(t, "mount", run("--mount", "type=bind,src="+dir+",dst=/host,options=rbind:ro", ref, "c", "sh", "-c",
		"cat /host/file; >/host/x || echo ', read-only'"), "of the host, read-only\n")
	run("--mount", "type=bind,src="+dir+",dst=/host,options=rbind:rw", ref, "c", "sh", "-c", "echo x > /host/made")
	if got, err := os.ReadFile(filepath.Join(dir, "made")); err != nil || string(got) != "x\n" {
		t.Errorf("what the container wrote: %q, %v", got, err)
	}
	has(t, u.fails(1, "run", "--rm", "--read-only", ref, "c", "touch", "/x"), "Read-only file system")
	u.fails(137, "run", "--rm", "--memory-limit", "16777216", ref, "c", "sh", "-c", "x=a; while :; do x=$x$x; done")
	equal(t, "init", run(ref, "c", "sh", "-c", "echo $$"), "1\n")
	equal(t, "capability", run("--cap-drop", "CAP_CHOWN", ref, "c", "sh", "-c", "chown 1 /bin 2>/dev/null || echo dropped"), "dropped\n")
	equal(t, "seccomp", run("--seccomp", ref, "c", "sh", "-c", "grep -c 'Seccomp:.2' /proc/self/status"), "1\n")
	equal(t, "host network", strings.TrimSpace(run("--net-host", ref, "c", "readlink", "/proc/self/ns/net")), readlink(t, "/proc/self/ns/net"))
	if got := strings.TrimSpace(run(ref, "c", "readlink", "/proc/self/ns/net")); got == readlink(t, "/proc/self/ns/net") {
		t.Error("a container is in the host's network namespace")
	}
	equal(t, "privileged", run("--privileged", ref, "c", "sh", "-c", "grep -c CapEff:.00000 /proc/self/status"), "1\n")

	file := filepath.Join(dir, "log")
	u.ctr("run", "-d", "--log-uri", "file://"+file, ref, "logged", "sh", "-c", "echo logged")
	until(t, "log", func() bool { got, _ := os.ReadFile(file); return string(got) == "logged\n" })
	until(t, "stop", func() bool { return row(t, u.ctr("t", "ls"), "logged")[2] == "STOPPED" })
	u.ctr("t", "rm", "logged")
	u.ctr("c", "rm", "logged")

	rootfs := t.TempDir() // without a snapshotter, and without an image that says what PATH is
	u.ctr("images", "mount", ref, rootfs)
	equal(t, "rootfs", run("--read-only", "--rootfs", rootfs, "c", "/bin/echo", "from a directory"), "from a directory\n")
	u.ctr("images", "unmount", "--rm", rootfs)
	u.unmounted()

	if got := u.ctr("c", "ls", "-q") + u.ctr("t", "ls", "-q"); got != "" {
		t.Errorf("run --rm left behind %q", got)
	}
	if list := u.ctr("snapshots", "ls"); rows(list) != 1 {
		t.Errorf("run --rm left behind snapshots:\n%s", list)
	}
}

func readlink(t *testing.T, path string) string {
	t.Helper()
	target, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return target
}

// until waits for what happens without anybody waiting for it.
// unmounted waits until the collector has taken what ctr 2 activates for an image and leaves to its lease.
func (u *user) unmounted() {
	u.t.Helper()
	until(u.t, "mounts are collected", func() bool {
		left, err := os.ReadDir(filepath.Join(u.State(), "mounts"))
		return err == nil && len(left) == 0
	})
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: it does not come", what)
		}
	}
}

// TestCtrStdin: what is piped into run and exec comes out whole, whatever its size. Nothing at all is not among the sizes:
// this ctr then never says that the input has ended, to containerd neither (see TestNoInput).
func TestCtrStdin(t *testing.T) { eachCtr(t, testCtrStdin) }

func testCtrStdin(t *testing.T) {
	u := newUser(t)
	u.ctr("run", "-d", "--memory-limit", fmt.Sprint(limit), ref, "box", "sleep", "1000")
	defer func() {
		u.ctr("t", "rm", "-f", "box")
		u.ctr("c", "rm", "box")
	}()
	for _, size := range []int64{1, 100, 4096, 65535, 65536, 65537, 1 << 20, 10 << 20} {
		for how, args := range map[string][]string{
			"run":  {"run", "--rm", "--memory-limit", fmt.Sprint(limit), ref, fmt.Sprintf("in%d", size), "cat"},
			"exec": {"t", "exec", "--exec-id", fmt.Sprintf("in%d", size), "box", "cat"},
		} {
			source := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{byte(size)}), size) }
			want, got := sha256.New(), sha256.New()
			if _, err := io.Copy(want, source()); err != nil {
				t.Fatal(err)
			}
			var n counter
			cmd := u.Command(args...)
			cmd.Stdin, cmd.Stdout = source(), io.MultiWriter(got, &n)
			ends(t, cmd)
			if string(want.Sum(nil)) != string(got.Sum(nil)) {
				t.Errorf("%s: of %d bytes %d came, or they are others", how, size, n)
			}
		}
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// TestCtrTerminal: a container behind a terminal, that ctr puts into raw mode and whose size it passes on.
func TestCtrTerminal(t *testing.T) { eachCtr(t, testCtrTerminal) }

func testCtrTerminal(t *testing.T) {
	u := newUser(t)
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = master.Close() }()
	slave, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := master.Resize(console.WinSize{Width: 93, Height: 31}); err != nil {
		t.Fatal(err)
	}
	seen := make(chan string)
	go func() {
		out, _ := io.ReadAll(master) // ends with EIO when the last slave is closed
		seen <- string(out)
	}()
	cmd := u.Command("run", "--rm", "--tty", ref, "term", "sh", "-c", "tty; until stty size | grep -q 93; do :; done; stty size; read line; echo got $line; exit 5")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := master.Write([]byte("typed\n")); err != nil {
		t.Fatal(err)
	}
	watch := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	err = cmd.Wait()
	watch.Stop()
	_ = slave.Close()
	if code := harness.Status(err); code != 5 {
		t.Errorf("exit status %d, not 5", code)
	}
	has(t, <-seen, "/dev/pts/", "31 93", "got typed")
}
