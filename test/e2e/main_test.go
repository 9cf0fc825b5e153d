package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/managerd/managerd/test/clients"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/hungfs"
	"github.com/managerd/managerd/test/image"
)

// ref is the image that every test runs.
const ref = image.Default

// limit keeps a container small, in bytes.
const limit = 64 << 20

var (
	bin     string // directory of the programs
	archive string // of the image
)

func TestMain(m *testing.M) {
	hungfs.Run()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "managerd-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	archive = filepath.Join(dir, "busybox.tar")
	if bin, err = harness.Programs(dir); err == nil {
		err = image.Write(archive, image.Options{Compression: image.Gzip})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// containerd2 is the ctr of containerd 2, while tests run with that; else "".
var containerd2 string

// eachCtr runs a test with Debian's ctr, which is containerd 1.6's, and with that of containerd 2.
func eachCtr(t *testing.T, test func(t *testing.T)) {
	t.Run("1", test)
	t.Run("2", func(t *testing.T) {
		var err error
		if containerd2, err = clients.Build(clients.Ctr); err != nil {
			t.Fatal(err)
		}
		defer func() { containerd2 = "" }()
		test(t)
	})
}

// user is somebody with ctr in front of a daemon.
type user struct {
	*harness.Daemon
	t *testing.T
}

// newUser gives a running daemon, with the image imported.
func newUser(t *testing.T) *user {
	t.Helper()
	u := &user{Daemon: harness.Test(t, bin), t: t}
	u.Client = containerd2
	u.ctr("images", "import", archive)
	return u
}

// hoarder is newUser with a daemon that collects no garbage: what a test loses is there until it looks.
func hoarder(t *testing.T) *user {
	t.Helper()
	u := newUser(t)
	file := filepath.Join(u.Dir, "config.toml")
	config := "version = 3\ndisabled_plugins = [\"io.containerd.gc.v1.scheduler\"]\n"
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := u.Stop(); err != nil {
		t.Fatal(err)
	}
	u.Args = append(u.Args, "--config", file)
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	return u
}

// ctr runs a command that must succeed, and gives its standard output.
func (u *user) ctr(args ...string) string {
	u.t.Helper()
	out, err := harness.Output(u.Command(args...))
	if err != nil {
		u.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// mctl runs a command of ours that must succeed.
func (u *user) mctl(args ...string) string {
	u.t.Helper()
	out, err := harness.Output(u.Mctl(args...))
	if err != nil {
		u.t.Fatalf("mctl %v: %v\n%s", args, err, out)
	}
	return out
}

// fails runs a command that must end with status, and gives what it wrote to standard error.
func (u *user) fails(status int, args ...string) string {
	u.t.Helper()
	return u.failing(status, u.Command(args...))
}

func (u *user) failing(status int, cmd *exec.Cmd) string {
	u.t.Helper()
	out, err := harness.Output(cmd)
	if harness.Status(err) != status {
		u.t.Fatalf("%s: exit status %d, not %d: %v\n%s", strings.Join(cmd.Args, " "), harness.Status(err), status, err, out)
	}
	if err == nil {
		return ""
	}
	return err.Error()
}

// has fails the test unless every part is in the text.
func has(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q is not in:\n%s", p, text)
		}
	}
}

// row finds the line of a table that begins with name, and gives its columns.
func row(t *testing.T, table, name string) []string {
	t.Helper()
	for _, line := range strings.Split(table, "\n") {
		if f := strings.Fields(line); len(f) > 0 && f[0] == name {
			return f
		}
	}
	t.Fatalf("no line begins with %q:\n%s", name, table)
	return nil
}

// rows is how many lines a table has below its heading.
func rows(table string) int {
	return max(0, len(strings.Split(strings.TrimSpace(table), "\n"))-1)
}

// equal fails the test unless got is want.
func equal(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, not %q", what, got, want)
	}
}

// matches fails the test unless the text matches the expression.
func matches(t *testing.T, text, expr string) {
	t.Helper()
	if !regexp.MustCompile(expr).MatchString(text) {
		t.Errorf("%q does not match:\n%s", expr, text)
	}
}
