package external

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	"github.com/managerd/managerd/reaper"
)

var (
	reap   *reaper.Reaper
	rootfs string
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "external-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	rootfs = filepath.Join(dir, "rootfs")
	shimbin.Rootfs(mainTB{}, rootfs) // before the reaper is there: it asks busybox
	if reap, err = reaper.New(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	for _, l := range shimbin.Leftovers(dir) {
		fmt.Fprintln(os.Stderr, "left behind:", l)
		code = 1
	}
	return code
}

// mainTB ends the run where there is no test yet.
type mainTB struct{ testing.TB }

func (mainTB) Helper() {}
func (mainTB) Fatal(a ...any) {
	fmt.Fprintln(os.Stderr, a...)
	os.Exit(1)
}

// TestLastError: the words of a runtime are found among whatever else is in its log.
func TestLastError(t *testing.T) {
	for _, c := range []struct{ log, want string }{
		{"", ""},
		{`{"level":"error","msg":"one"}`, "one"},
		{`{"level":"error","msg":"one"}` + "\n" + `{"level":"error","msg":" two \n"}` + "\n" + `{"level":"warning","msg":"three"}`, "two"},
		{"no json\n{\"level\":\"error\"}\n{\"level\":\"info\",\"msg\":\"x\"}\n", ""},
		{`{"level":"error","msg":"cut`, ""},
	} {
		if got := lastError([]byte(c.log)); got != c.want {
			t.Errorf("%q: %q, want %q", c.log, got, c.want)
		}
	}
}

// TestFailure: what went wrong is told in the runtime's words, and is of a kind where they say which.
func TestFailure(t *testing.T) {
	e := &Engine{binary: "/usr/bin/row"}
	log := filepath.Join(t.TempDir(), "log")
	for _, c := range []struct {
		said, want string
		invalid    bool
	}{
		{"", "row: exit status 9", false},
		{`exec: \"x\": executable file not found in $PATH`, "row: exec: \"x\": executable file not found in $PATH", true},
		{"executable file `x` not found: No such file or directory", "No such file", true},
		{"cannot write memory.max: permission denied", "row: cannot write memory.max: permission denied", false},
	} {
		if err := os.WriteFile(log, []byte(`{"level":"error","msg":"`+c.said+`"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		err := e.failure(errors.New("exit status 9"), log)
		if !strings.Contains(err.Error(), c.want) || errdefs.IsInvalidArgument(err) != c.invalid {
			t.Errorf("%q: %v", c.said, err)
		}
	}
}

// TestRewrite: config.json says what has to be otherwise, and all else as before, fields that nobody here knows too.
func TestRewrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	const before = `{"ociVersion":"1.0.2","next":{"a":[1,2]},"process":{"terminal":true,"cwd":"/","row":7,"rlimits":[{"type":"RLIMIT_NOFILE","hard":9,"soft":8}]}}`
	write := func() os.FileInfo {
		if err := os.WriteFile(path, []byte(before), 0o600); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi
	}
	limits := []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 9, Soft: 8}}
	old := write()
	if err := rewrite(dir, &specs.Process{Terminal: true, Rlimits: limits}); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || !os.SameFile(old, fi) {
		t.Errorf("it is written anew though nothing has changed: %v", err)
	}
	score := -5
	if err := rewrite(dir, &specs.Process{Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 5, Soft: 5}}, OOMScoreAdj: &score}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"next":{"a":[1,2]},"ociVersion":"1.0.2","process":{"cwd":"/","oomScoreAdj":-5,"rlimits":[{"type":"RLIMIT_NOFILE","hard":5,"soft":5}],"row":7,"terminal":false}}`
	if string(data) != want {
		t.Errorf("got  %s\nwant %s", data, want)
	}
	for _, bad := range []string{"", "[]", `{"process":[]}`} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := rewrite(dir, &specs.Process{Terminal: true}); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// TestMaster: a terminal that a runtime does not send is an error, and so is something else.
func TestMaster(t *testing.T) {
	for _, c := range []struct {
		name string
		send func(*net.UnixConn) error
		want string
	}{
		{"nothing", func(*net.UnixConn) error { return nil }, "EOF"},
		{"no descriptor", func(c *net.UnixConn) error { _, err := c.Write([]byte("x")); return err }, "sent none"},
		{"two", func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte("x"), unix.UnixRights(1, 2), nil)
			return err
		}, "terminal"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, remove, err := scratch()
			if err != nil {
				t.Fatal(err)
			}
			defer remove()
			s, err := newStreams(engine.IO{Console: func(*os.File) error { return nil }}, dir)
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.socket().Path(), Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.send(conn); err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
			if master, err := s.master(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, %v, want an error that says %q", master, err, c.want)
			}
		})
	}
}

// TestDescribe: a runtime that does not run is an error that names it.
func TestDescribe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(path, []byte("#!/bin/false\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	_ = reap.Guard(func() error { _, err = Describe(context.Background(), path); return nil })
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), path) {
		t.Errorf("error is %v", err)
	}
}

// recorder gives a runtime that writes down how it was called, and is runc.
func recorder(t *testing.T) (path, calls string) {
	t.Helper()
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatalf("%v (Debian: apt-get install runc)", err)
	}
	dir := t.TempDir()
	path, calls = filepath.Join(dir, "recorder"), filepath.Join(dir, "calls")
	script := "#!/bin/sh\necho \"$@\" >>" + calls + "\nexec " + runc + " \"$@\"\n"
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path, calls
}

// TestOptions: the options of a create reach the program, and its process is clamped and noted as with our own engine.
func TestOptions(t *testing.T) {
	path, calls := recorder(t)
	var log strings.Builder
	bundle := t.TempDir()
	cfg := engine.Config{
		Root: filepath.Join(bundle, "state"), Reaper: reap, NoPivotRoot: true, NoNewKeyring: true, Log: slog.New(slog.NewTextHandler(&log, nil)),
	}
	e, err := New(cfg, path)
	if err != nil {
		t.Fatal(err)
	}
	spec := shimbin.Spec("options", "sh", "-c", "ulimit -Hn; cat /proc/self/oom_score_adj")
	spec.Root.Path = rootfs
	var have unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &have); err != nil {
		t.Fatal(err)
	}
	score := -7
	spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: have.Max + 1, Soft: 9}}
	spec.Process.OOMScoreAdj = &score
	shimbin.Bundle(t, bundle, spec)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	c, err := e.Create(context.Background(), "options", bundle, spec, engine.IO{Stdout: w})
	_ = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(context.Background()); err != nil {
		t.Error(err)
	}
	c.Init().Exit()
	out := make([]byte, 100)
	n, _ := r.Read(out)
	if err := c.Destroy(); err != nil {
		t.Error(err)
	}
	want := *spec.Process
	want.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: have.Max + 1, Soft: 9}}
	engine.NewClamp(slog.New(slog.DiscardHandler)).Process(&want)
	if got, want := string(out[:n]), fmt.Sprintf("%d\n%d\n", want.Rlimits[0].Hard, *want.OOMScoreAdj); got != want {
		t.Errorf("hard limit and oom_score_adj are %q, want %q", got, want)
	}
	if clamped := want.Rlimits[0].Hard == have.Max; clamped != strings.Contains(log.String(), "RLIMIT_NOFILE") {
		t.Errorf("clamped %v, and the log says %q", clamped, log.String())
	}
	data, err := os.ReadFile(calls)
	if err != nil {
		t.Fatal(err)
	}
	create, _, _ := strings.Cut(string(data), "\n")
	for _, arg := range []string{"--root " + cfg.Root, "--no-pivot", "--no-new-keyring", "--log-format json", "create --bundle " + bundle} {
		if !strings.Contains(create, arg) {
			t.Errorf("%q has no %s", create, arg)
		}
	}
	if strings.Contains(create, "--systemd-cgroup") {
		t.Errorf("%q asks for systemd", create)
	}
}

// TestSystemdCgroup: that the cgroup is systemd's to make is told to every command.
func TestSystemdCgroup(t *testing.T) {
	path, calls := recorder(t)
	bundle := t.TempDir()
	e, err := New(engine.Config{Root: filepath.Join(bundle, "state"), Reaper: reap, SystemdCgroup: true}, path)
	if err != nil {
		t.Fatal(err)
	}
	spec := shimbin.Spec("systemd", "true")
	spec.Root.Path = rootfs
	spec.Linux.CgroupsPath = "system.slice:external-test:row"
	shimbin.Bundle(t, bundle, spec)
	c, err := e.Create(context.Background(), "systemd", bundle, spec, engine.IO{})
	if err == nil { // with a systemd
		_ = c.Signal(unix.SIGKILL, false)
		<-c.Init().Done()
		if err := c.Destroy(); err != nil {
			t.Error(err)
		}
	} else if _, serr := os.Stat("/run/systemd/system"); serr == nil || !strings.Contains(err.Error(), "systemd") {
		t.Errorf("error is %v", err)
	}
	data, rerr := os.ReadFile(calls)
	if rerr != nil || !strings.Contains(string(data), "--systemd-cgroup create") {
		t.Errorf("calls: %q, %v", data, rerr)
	}
}

// TestRefusedBefore: what no runtime should be asked is refused with our own sentences, and nothing is called.
func TestRefusedBefore(t *testing.T) {
	path, calls := recorder(t)
	bundle := t.TempDir()
	e, err := New(engine.Config{Root: filepath.Join(bundle, "state"), Reaper: reap}, path)
	if err != nil {
		t.Fatal(err)
	}
	for says, mod := range map[string]func(*specs.Spec){
		"process.args":     func(s *specs.Spec) { s.Process.Args = nil },
		"linux.mountLabel": func(s *specs.Spec) { s.Linux.MountLabel = "x" },
		"windows":          func(s *specs.Spec) { s.Windows = &specs.Windows{} },
		"hooks.prestart": func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{Prestart: []specs.Hook{{Path: "x"}}} //lint:ignore SA1019 old clients set it
		},
	} {
		spec := shimbin.Spec("refused", "true")
		spec.Root.Path = rootfs
		mod(spec)
		if says == "linux.mountLabel" {
			if _, err := os.Stat("/sys/fs/selinux/enforce"); err == nil {
				continue
			}
		}
		if c, err := e.Create(context.Background(), "refused", bundle, spec, engine.IO{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, %v", says, c, err)
		}
	}
	if _, err := os.Stat(calls); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the runtime was called: %v", err)
	}
}

// TestCreateFails: of a create that failed nothing is left, and an id that is in use is not touched.
func TestCreateFails(t *testing.T) {
	path, _ := recorder(t)
	bundle := t.TempDir()
	root := filepath.Join(bundle, "state")
	e, err := New(engine.Config{Root: root, Reaper: reap}, path)
	if err != nil {
		t.Fatal(err)
	}
	spec := shimbin.Spec("fails", "no-such-program")
	spec.Root.Path = rootfs
	shimbin.Bundle(t, bundle, spec)
	c, err := e.Create(context.Background(), "fails", bundle, spec, engine.IO{})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("%v, %v", c, err)
	}
	if _, err := os.Stat(filepath.Join(root, "fails")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its state is left: %v", err)
	}
	if err := os.Mkdir(filepath.Join(root, "fails"), 0o700); err != nil {
		t.Fatal(err)
	}
	if c, err := e.Create(context.Background(), "fails", bundle, spec, engine.IO{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("in use: %v, %v", c, err)
	}
}

// TestTakeOver: a container is found by another incarnation as it is: parked, running, paused, and then gone.
func TestTakeOver(t *testing.T) {
	path, _ := recorder(t)
	bundle := t.TempDir()
	cfg := engine.Config{Root: filepath.Join(bundle, "state"), Reaper: reap}
	e, err := New(cfg, path)
	if err != nil {
		t.Fatal(err)
	}
	spec := shimbin.Spec("taken", "sleep", "1000")
	spec.Root.Path = rootfs
	shimbin.Bundle(t, bundle, spec)
	c, err := e.Create(context.Background(), "taken", bundle, spec, engine.IO{})
	if err != nil {
		t.Fatal(err)
	}
	look := func(want engine.Found) *Container {
		t.Helper()
		next, err := New(cfg, path)
		if err != nil {
			t.Fatal(err)
		}
		taken, found, err := next.Load("taken", bundle, c.Init(), "")
		if err != nil {
			t.Fatal(err)
		}
		if found.Parked != want.Parked || found.Paused != want.Paused || found.Removed != want.Removed {
			t.Errorf("found %+v, want %+v", found, want)
		}
		return taken
	}
	if err := look(engine.Found{Parked: true}).Start(context.Background()); err != nil {
		t.Error(err)
	}
	if err := look(engine.Found{}).Pause(); err != nil {
		t.Error(err)
	}
	taken := look(engine.Found{Paused: true})
	if taken.SharedPID() {
		t.Error("its pid namespace is forgotten")
	}
	// A paused container dies of SIGKILL.
	if err := taken.Signal(unix.SIGKILL, false); err != nil {
		t.Error(err)
	}
	if e := c.Init().Exit(); e.Status != 137 {
		t.Errorf("exit status %d", e.Status)
	}
	if err := look(engine.Found{}).Destroy(); err != nil {
		t.Error(err)
	}
	look(engine.Found{Removed: true})
}
