package stdio

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger/loggertest"
	"github.com/managerd/managerd/test/hungfs"
)

func TestMain(m *testing.M) {
	loggertest.Run()
	hungfs.Run()
	goleak.VerifyTestMain(m)
}

// mkfifos makes the client's side.
func mkfifos(t testing.TB) (dir string, cfg Config) {
	t.Helper()
	dir = t.TempDir()
	for _, n := range []string{"in", "out", "err"} {
		if err := unix.Mkfifo(filepath.Join(dir, n), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, Config{Dir: dir, Stdin: filepath.Join(dir, "in"), Stdout: filepath.Join(dir, "out"), Stderr: "fifo://" + filepath.Join(dir, "err")}
}

// run starts a shell with the streams of cfg, as the engine does.
func run(t testing.TB, cfg Config, script string) (*Streams, *exec.Cmd) {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	cmd := exec.Command("/bin/sh", "-c", script)
	in, out, errf := s.Files()
	if in != nil {
		cmd.Stdin = in
	}
	if out != nil {
		cmd.Stdout = out
	}
	if errf != nil {
		cmd.Stderr = errf
	}
	if err := errors.Join(s.OpenInput(), cmd.Start()); err != nil {
		t.Fatal(err)
	}
	s.Started()
	return s, cmd
}

// reader reads a FIFO to its end, as a client does.
func reader(t testing.TB, path string) <-chan []byte {
	t.Helper()
	got := make(chan []byte, 1)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		data, _ := io.ReadAll(f)
		_ = f.Close()
		got <- data
	}()
	return got
}

func TestOutput(t *testing.T) {
	dir, cfg := mkfifos(t)
	s, cmd := run(t, cfg, "echo out; echo err >&2; seq 1 200000; exit 3")
	out, errs := reader(t, filepath.Join(dir, "out")), reader(t, filepath.Join(dir, "err"))
	_ = cmd.Wait()
	s.Drain(5 * time.Second)
	got := <-out
	if want := "out\n1\n2\n"; !bytes.HasPrefix(got, []byte(want)) || !bytes.HasSuffix(got, []byte("\n199999\n200000\n")) || len(got) != 4+1288895 {
		t.Errorf("%d bytes of output", len(got))
	}
	if got := <-errs; string(got) != "err\n" {
		t.Errorf("stderr is %q", got)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".init.*")); len(left) != 3 {
		t.Errorf("container-side FIFOs: %v", left)
	}
	s.Close()
	if left, _ := filepath.Glob(filepath.Join(dir, ".init.*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestLateClient: a client that opens its FIFO only after a short process has ended gets everything, and the end.
func TestLateClient(t *testing.T) {
	dir, cfg := mkfifos(t)
	s, cmd := run(t, cfg, "echo hello")
	_ = cmd.Wait()
	s.Drain(5 * time.Second)
	if got := <-reader(t, filepath.Join(dir, "out")); string(got) != "hello\n" {
		t.Errorf("got %q", got)
	}
}

// TestStalledClient: nobody reads; draining gives up, closing does not hang, and reading later still gets it all.
func TestStalledClient(t *testing.T) {
	dir, cfg := mkfifos(t)
	s, cmd := run(t, cfg, "dd if=/dev/zero bs=1024 count=8192 2>/dev/null")
	time.Sleep(20 * time.Millisecond)
	begin := time.Now()
	s.Drain(50 * time.Millisecond)
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("draining took %v", took)
	}
	got := <-reader(t, filepath.Join(dir, "out"))
	_ = cmd.Wait()
	if len(got) != 8<<20 {
		t.Errorf("got %d bytes", len(got))
	}
}

// TestDescendant: a daemon that keeps the stream does not hold up the exit of its parent, and goes on writing.
func TestDescendant(t *testing.T) {
	dir, cfg := mkfifos(t)
	if err := unix.Mkfifo(filepath.Join(dir, "in2"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, cmd := run(t, cfg, "echo first; (read x; echo second) <"+filepath.Join(dir, "in2")+" & exit 0")
	out := reader(t, filepath.Join(dir, "out"))
	_ = cmd.Wait()
	begin := time.Now()
	s.Drain(10 * time.Second)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("draining took %v", took)
	}
	w, err := os.OpenFile(filepath.Join(dir, "in2"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.WriteString("go\n")
	_ = w.Close()
	if got := <-out; string(got) != "first\nsecond\n" {
		t.Errorf("got %q", got)
	}
}

// TestInput: clients come and go, and only CloseStdin ends the input, after everything was delivered.
func TestInput(t *testing.T) {
	dir, cfg := mkfifos(t)
	s, cmd := run(t, cfg, "cat")
	out := reader(t, filepath.Join(dir, "out"))
	want := ""
	for i := range 3 {
		w, err := os.OpenFile(filepath.Join(dir, "in"), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Repeat(fmt.Sprintf("client %d\n", i), 10000)
		if _, err := w.WriteString(text); err != nil {
			t.Fatal(err)
		}
		want += text
		_ = w.Close()
	}
	s.CloseStdin()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	s.Drain(5 * time.Second)
	if got := <-out; string(got) != want {
		t.Errorf("got %d bytes, want %d", len(got), len(want))
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "log")
	for range 2 {
		s, cmd := run(t, Config{Dir: dir, Stdout: "file://" + path}, "echo line")
		_ = cmd.Wait()
		s.Drain(5 * time.Second)
		s.Close()
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "line\nline\n" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestBadStreams(t *testing.T) {
	dir, _ := mkfifos(t)
	for _, c := range []struct {
		cfg Config
		is  func(error) bool
	}{
		{Config{Stdout: "relative"}, errdefs.IsInvalidArgument},
		{Config{Stdout: "/no/such/fifo"}, errdefs.IsInvalidArgument},
		{Config{Stdout: "syslog:///bin/logger"}, errdefs.IsNotImplemented},
		{Config{Stdout: "binary://bin/logger"}, errdefs.IsInvalidArgument},
		{Config{Stdout: "file://host/log"}, errdefs.IsInvalidArgument},
		{Config{Stdout: "file:///etc"}, errdefs.IsInvalidArgument},
		{Config{Stdout: "null:///x"}, errdefs.IsInvalidArgument},
		{Config{Stdin: "file:///etc/passwd"}, errdefs.IsInvalidArgument},
		{Config{Stdin: "/etc/passwd"}, errdefs.IsInvalidArgument},
	} {
		c.cfg.Dir = dir
		if _, err := Open(c.cfg); !c.is(err) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
	}
}

// TestInputClosedEarly: a client that closes the input while most of it is still in the pipes loses nothing of it.
func TestInputClosedEarly(t *testing.T) {
	want := bytes.Repeat([]byte("a line\n"), 300000)
	for range 5 {
		dir, cfg := mkfifos(t)
		s, cmd := run(t, cfg, "cat")
		out := reader(t, filepath.Join(dir, "out"))
		w, err := os.OpenFile(filepath.Join(dir, "in"), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(want); err != nil {
			t.Fatal(err)
		}
		s.CloseStdin()
		_ = w.Close()
		_ = cmd.Wait()
		s.Drain(5 * time.Second)
		if got := <-out; !bytes.Equal(got, want) {
			t.Errorf("%d bytes of %d", len(got), len(want))
		}
		s.Close()
	}
}

// TestDrainWaitsForClient: the exit is not told while a client that reads has not taken all of the output.
func TestDrainWaitsForClient(t *testing.T) {
	dir, cfg := mkfifos(t)
	s, cmd := run(t, cfg, "head -c 300000 /dev/zero")
	f, err := os.OpenFile(filepath.Join(dir, "out"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := io.ReadFull(f, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		s.Drain(20 * time.Second)
	}()
	select {
	case <-drained:
		t.Error("drained, with most of it unread")
	case <-time.After(2 * fresh):
	}
	if _, err := io.ReadFull(f, make([]byte, 299000)); err != nil {
		t.Fatal(err)
	}
	<-drained
	s.Close()
}

// TestDrainToFile: nobody takes anything out of a file, so nobody is waited for, also when both streams go into one.
func TestDrainToFile(t *testing.T) {
	dir := t.TempDir()
	log := "file://" + filepath.Join(dir, "log")
	s, cmd := run(t, Config{Dir: dir, Stdout: log, Stderr: log}, "seq 1 1000; seq 1 1000 >&2")
	_ = cmd.Wait()
	began := time.Now()
	s.Drain(time.Minute)
	if took := time.Since(began); took > drainMost/2 {
		t.Errorf("it took %v", took)
	}
	done := make(chan struct{})
	go func() {
		s.copies.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Error("copying goes on after the end of the streams")
	}
}

// TestFullAtEnd: a client whose FIFO is full just when a process ends sees the end of its output.
func TestFullAtEnd(t *testing.T) {
	dir, cfg := mkfifos(t)
	cfg.Stdin, cfg.Stderr = "", ""
	client, err := os.OpenFile(filepath.Join(dir, "out"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	file := filepath.Join(dir, "size") // how much fits in, which the kernel says when the FIFO is open
	s, cmd := run(t, cfg, fmt.Sprintf("until [ -e %s ]; do sleep 0.01; done; head -c $(cat %[1]s) /dev/zero", file))
	size := 0
	conn, err := client.SyscallConn()
	if err == nil {
		err = conn.Control(func(fd uintptr) { size, err = unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0) })
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".new", []byte(fmt.Sprint(size)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		s.copies.Wait()
		close(done)
	}()
	for deadline := time.Now().Add(time.Minute); unreadFile(client) < size; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d bytes have come", unreadFile(client), size)
		}
	}
	if err := client.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, client); n != int64(size) || err != nil {
		t.Errorf("%d of %d bytes, %v", n, size, err)
	}
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Error("copying goes on after the end of the output")
	}
}

// TestNoGrowth opens and closes many: descriptors must not grow (goroutines are checked at the end of the package).
func TestNoGrowth(t *testing.T) {
	_, cfg := mkfifos(t)
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := fds()
	for range 200 {
		s, err := Open(cfg)
		if err == nil {
			err = s.OpenInput()
		}
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	if after := fds(); after > before+2 {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func TestTerminal(t *testing.T) {
	dir, cfg := mkfifos(t)
	cfg.Terminal = true
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Resize(1, 1); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resize without a terminal: %v", err)
	}
	master, slave := openPTY(t)
	if err := errors.Join(s.SetConsole(master), s.OpenInput()); err != nil {
		t.Fatal(err)
	}
	if err := s.Resize(99, 33); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", "stty size; read x; echo got $x")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	out := reader(t, filepath.Join(dir, "out"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close()
	w, err := os.OpenFile(filepath.Join(dir, "in"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.WriteString("hello\n")
	_ = w.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	s.Drain(5 * time.Second)
	got := strings.ReplaceAll(string(<-out), "\r", "")
	if !strings.Contains(got, "33 99\n") || !strings.Contains(got, "got hello\n") {
		t.Errorf("got %q", got)
	}
}

func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "ptmx"), slave
}

// TestFullDisk: output to a file waits while there is no room, and goes on without a byte lost.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	small := filepath.Join(dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(small, unix.MNT_DETACH) }()
	ballast := filepath.Join(small, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 200<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(small, "log")
	s, cmd := run(t, Config{Dir: dir, Stdout: "file://" + log}, "seq 1 20000")
	_ = cmd.Wait() // it does not block: the kernel's pipe takes it
	s.Drain(100 * time.Millisecond)
	if fi, err := os.Stat(log); err != nil || fi.Size() >= 108894 {
		t.Fatalf("the disk is not full: %v, %v", fi.Size(), err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	s.Drain(10 * time.Second)
	got, err := os.ReadFile(log)
	if err != nil || len(got) != 108894 || !bytes.HasSuffix(got, []byte("\n19999\n20000\n")) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestCloseFullDisk: closing does not wait for room.
func TestCloseFullDisk(t *testing.T) {
	s, cmd := run(t, Config{Dir: t.TempDir(), Stdout: "file:///dev/full"}, "echo line")
	_ = cmd.Wait()
	begin := time.Now()
	s.Close()
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestCloseUnderLoad: streams are closed while both sides are busy and other files come and go; the copies never touch a
// descriptor that has been given to somebody else.
func TestCloseUnderLoad(t *testing.T) {
	for range 50 {
		dir, cfg := mkfifos(t)
		s, cmd := run(t, cfg, "exec cat /dev/zero")
		f, err := os.OpenFile(filepath.Join(dir, "out"), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.CopyN(io.Discard, f, 4<<20)
			var p [2]int
			for range 20 { // who gets the numbers that Close gives back?
				if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
					t.Error(err)
					return
				}
				if n, err := unix.Read(p[0], make([]byte, 1)); !errors.Is(err, unix.EAGAIN) {
					t.Errorf("read %d bytes of somebody else's, %v", n, err)
				}
				_ = unix.Close(p[0])
				_ = unix.Close(p[1])
			}
		}()
		s.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = f.Close()
		<-done
	}
}
