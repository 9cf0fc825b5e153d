package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/image"
)

// programs are the three, and the client that speaks ctr's grammar too.
func programs(t *testing.T) (bin, ctr string) {
	t.Helper()
	bin, err := harness.Programs(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if ctr, err = exec.LookPath("ctr"); err != nil {
		t.Fatalf("%v (Debian: apt-get install containerd)", err)
	}
	return bin, ctr
}

var place = regexp.MustCompile(`(?m)^All of it happens below (\S+) `)

// play runs the demo and fails the test if anything of it is left.
func play(ctx context.Context, t *testing.T, bin, archive, client string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(ctx, newScreen(&out, false), bin, archive, client)
	m := place.FindStringSubmatch(out.String())
	if m == nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if _, serr := os.Stat(m[1]); !errors.Is(serr, fs.ErrNotExist) {
		t.Errorf("%s is there: %v", m[1], serr)
	}
	for _, p := range []string{"/proc/[0-9]*/cmdline", "/proc/self/mountinfo"} {
		files, _ := filepath.Glob(p)
		for _, f := range files {
			if data, _ := os.ReadFile(f); strings.Contains(string(data), m[1]) {
				t.Errorf("%s is in %s:\n%s", m[1], f, data)
			}
		}
	}
	namespace := "demo" + strings.TrimPrefix(filepath.Base(m[1]), "managerd")
	for _, p := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		if left, _ := filepath.Glob(p + namespace); len(left) > 0 {
			t.Errorf("cgroups are left: %v", left)
		}
	}
	return out.String(), err
}

// archive is an image without a shell, unless shell is true.
func archive(t *testing.T, shell bool, cmd ...string) string {
	t.Helper()
	o := image.Options{Name: "example.com/own:v1", Cmd: cmd}
	if !shell {
		o.Layers = [][]image.File{{{Name: "bin/.wh.sh", Mode: 0o644}}}
	}
	file := filepath.Join(t.TempDir(), "own.tar")
	if err := image.Write(file, o); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestDemo(t *testing.T) {
	bin, ctr := programs(t)
	for _, c := range []struct {
		name, client string
		archive      string
		want         []string
		not          string
		fails        string
	}{
		{name: "busybox", want: []string{"each of them once, in order", "42: its shim had written", "All 10 checks held"}},
		{name: "busybox by ctr", want: []string{"each of them once, in order", "42: its shim had written", "All 10 checks held"}},
		{name: "own, with a shell", archive: archive(t, true, "sleep", "1000"),
			want: []string{"found again, not started again", "It has: what follows", "42: its shim had written", "each of them once"}},
		{name: "own, goes on, no shell", archive: archive(t, false, "sleep", "1000"),
			want: []string{"found again, not started again", "It has not. So this cannot be shown"}, not: "A container that counts"},
		{name: "own, ends, no shell", archive: archive(t, false, "ls", "/etc/passwd", "/nowhere"),
			want: []string{"│ /etc/passwd", "It has ended by itself, with status 1", "Status 1, from a manager", "It has not."}},
		{name: "own, nothing runs", archive: archive(t, false, "/nothing"), fails: "neither a command that can be run nor a shell"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := play(context.Background(), t, bin, c.archive, ctr)
			if c.fails == "" && err != nil || c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
				t.Errorf("%v, want %q", err, c.fails)
			}
			for _, w := range c.want {
				if !strings.Contains(out, w) {
					t.Errorf("%q is missing", w)
				}
			}
			if c.not != "" && strings.Contains(out, c.not) {
				t.Errorf("%q is there", c.not)
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// TestInterrupted: a signal at any moment leaves nothing, and is no success.
func TestInterrupted(t *testing.T) {
	bin, ctr := programs(t)
	for _, after := range []time.Duration{50, 300, 700, 1200, 1700} {
		ctx, cancel := context.WithTimeout(context.Background(), after*time.Millisecond)
		out, err := play(ctx, t, bin, "", ctr)
		cancel()
		if err == nil || !strings.Contains(err.Error(), "interrupted") || !strings.Contains(err.Error(), "is gone again") {
			t.Errorf("after %d ms: %v\n%s", after, err, out)
		}
	}
}

// TestMismatch: what the demo claims it looks at. A client that lies makes it fail.
func TestMismatch(t *testing.T) {
	bin, ctr := programs(t)
	lies := func(name, script string) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for _, c := range []struct{ name, script, want string }{
		{"another pid", `[ "$1 $2" = "tasks ls" ] && { printf 'TASK PID STATUS\ncounter %s RUNNING\n' $$; exit; }; exec ` + ctr + ` "$@"`, "is gone"},
		{"no such task", `[ "$1 $2" = "tasks ls" ] && { echo TASK PID STATUS; exit; }; exec ` + ctr + ` "$@"`, "is not in the table"},
		{"fails", `[ "$1" = run ] && { echo no >&2; exit 3; }; exec ` + ctr + ` "$@"`, "ended with status 3: no"},
		{"elsewhere", `[ "$1 $2" = "tasks exec" ] && { readlink /proc/self/ns/pid; exit; }; exec ` + ctr + ` "$@"`, "the program ran in"},
		{"another status", `[ "$1 $2" = "tasks rm" ] && { echo 41 >&2; exit; }; exec ` + ctr + ` "$@"`, "and not 42"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := play(context.Background(), t, bin, "", lies("ctr", c.script))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q\n%s", err, c.want, out)
			}
		})
	}
}

func TestWrap(t *testing.T) {
	if got := strings.Join(wrap("aa bb cccc d", 5), "|"); got != "aa bb|cccc|d" {
		t.Error(got)
	}
	if got := quoted([]string{"sh", "-c", "echo 'x'; y", ""}); got != `sh -c 'echo '\''x'\''; y' ''` {
		t.Error(got)
	}
}
