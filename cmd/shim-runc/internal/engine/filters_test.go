package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// compiledFilter waits until the directory has the one compiled filter of the test's profile, and gives its path.
func compiledFilter(t *testing.T, dir string) string {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		all, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		if len(all) == 1 && !strings.HasSuffix(all[0], ".new") {
			return all[0]
		}
	}
	t.Fatalf("no filter was compiled in %s", dir)
	return ""
}

// TestCompiledFilter: a profile is compiled once; from then on every init and exec is given what was compiled, does what it
// says, and does not see it. Nothing is used that was not made of the very profile.
func TestCompiledFilter(t *testing.T) {
	f := newFixture(t)
	dir := filepath.Join(t.TempDir(), "filters")
	logged := f.logged()
	f.Engine = New(Config{Root: f.root, Reaper: reap, FilterDir: dir, Log: f.cfg.Log})
	exdev, exist := uint(unix.EXDEV), uint(unix.EEXIST)
	profile := func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86},
			Syscalls: []specs.LinuxSyscall{
				{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &exdev},
				{Names: []string{"kill"}, Action: specs.ActErrno, ErrnoRet: &exist, Args: []specs.LinuxSeccompArg{
					{Index: 1, Value: uint64(unix.SIGUSR2), Op: specs.OpEqualTo},
				}},
			},
		}
	}
	const (
		script  = "mkdir /tmp/d; kill -USR1 $$; kill -USR2 $$; ls -l /proc/$$/fd 2>/dev/null | grep -c -e memfd -e seccomp; " + `grep -c "^Seccomp:.*2" /proc/self/status`
		refused = "mkdir: can't create directory '/tmp/d': Invalid cross-device link\nsh: can't kill pid N: File exists\n0\n1"
	)
	run := "trap : USR1; " + strings.ReplaceAll(script, "USR2 $$", "USR2 $$ 2>&1 | sed 's/pid [0-9]*/pid N/'")
	want := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	user := func(s *specs.Spec) {
		profile(s)
		s.Process.User.UID, s.Process.NoNewPrivileges = 1000, true
	}

	want("compiled by init", f.runShell(t, profile, run), refused)
	file := compiledFilter(t, dir)
	want("compiled before", f.runShell(t, profile, run), refused)
	want("without privileges", f.runShell(t, user, run), refused)
	c := f.create(t, IO{}, profile, "sleep", "1000")
	start(t, c)
	want("exec", f.execShell(t, c, func(*specs.Process) {}, run), refused)

	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	calls := binary.NativeEndian.Uint32(good[8:])
	allow := binary.NativeEndian.AppendUint32([]byte{unix.BPF_RET, 0, 0, 0}, unix.SECCOMP_RET_ALLOW)
	put := func(data []byte) {
		t.Helper()
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	other := append(bytes.Clone(good[:16+calls]), allow...)
	binary.NativeEndian.PutUint32(other[12:], uint32(len(allow)))
	put(other) // which shows that it is this file that decides
	if got := f.execShell(t, c, func(*specs.Process) {}, "mkdir /tmp/allowed && echo done"); got != "done" {
		t.Errorf("the compiled filter is not used: %q", got)
	}
	other[16+calls-1] ^= 1 // of another profile now
	put(other)
	want("of another profile", f.execShell(t, c, func(*specs.Process) {}, run), refused)

	for what, bad := range map[string][]byte{"cut off": good[:len(good)-8], "empty": {}, "no filter": bytes.Repeat([]byte{7}, len(good))} {
		put(bad)
		want(what, f.execShell(t, c, func(*specs.Process) {}, run), refused)
		compiledFilter(t, dir)
		if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, good) {
			t.Errorf("%s: it was not compiled again: %d bytes, %v", what, len(now), err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put(append(bytes.Clone(good[:16+calls]), allow...))
	want("directory of others", f.execShell(t, c, func(*specs.Process) {}, run), refused)
	if text := logged.String(); !strings.Contains(text, dir+" is not used for compiled seccomp filters") {
		t.Errorf("logged: %s", text)
	}
}

// TestCompiledFilterTerminal: a terminal and a filter are handed over both.
func TestCompiledFilterTerminal(t *testing.T) {
	f := newFixture(t)
	dir := filepath.Join(t.TempDir(), "filters")
	f.Engine = New(Config{Root: f.root, Reaper: reap, FilterDir: dir})
	profile := func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}}}
	}
	c := f.create(t, IO{}, profile, "sleep", "1000")
	start(t, c)
	compiledFilter(t, dir)
	masters := make(chan *os.File, 1)
	p := &specs.Process{Args: []string{"sh", "-c", "test -t 0 || exit 3; mkdir /tmp/d && exit 4; exit 5"}, Env: []string{"PATH=/bin"}, Cwd: "/", Terminal: true}
	proc, err := c.Exec(context.Background(), "tty", p, IO{Console: func(m *os.File) error { masters <- m; return nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = (<-masters).Close() }()
	if e := proc.Exit(); e.Status != 5 {
		t.Errorf("exit status %d, want 5", e.Status)
	}
}
