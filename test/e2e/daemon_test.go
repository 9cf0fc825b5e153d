package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/managerd/managerd/test/harness"
)

// TestConfigFile: the file says how the daemon runs, and what is wrong in it is told with its line and its key.
func TestConfigFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	managerd := func(args ...string) *exec.Cmd {
		ctx, cancel := context.WithTimeout(context.Background(), harness.Starting)
		t.Cleanup(cancel)
		return exec.CommandContext(ctx, filepath.Join(bin, "managerd"), append([]string{"--config", file}, args...)...)
	}

	write("version = 2\nroot = \"" + dir + "/root\"\nstate = 7\n")
	for _, args := range [][]string{nil, {"config", "dump"}} {
		_, err := harness.Output(managerd(args...))
		if harness.Status(err) != 1 {
			t.Fatalf("%v", err)
		}
		has(t, err.Error(), file, "3", "state")
	}
	if _, err := os.Stat(dir + "/root"); err == nil {
		t.Error("it made its root in spite of that")
	}
	_, err := harness.Output(managerd("--config", dir+"/nosuch"))
	has(t, err.Error(), dir+"/nosuch")

	// What the daemon prints as its default is a file that it reads, and from which nothing differs.
	printed, err := harness.Output(managerd("config", "default"))
	if err != nil {
		t.Fatal(err)
	}
	write(printed)
	dumped, err := harness.Output(managerd("config", "dump"))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "default, read and printed", dumped, printed)
	_, err = harness.Output(managerd("--log-level", "loud", "config", "dump"))
	has(t, err.Error(), "loud", "debug")
}

// TestReload: SIGHUP has the file read again. What can change meanwhile does; a file with an error changes nothing.
func TestReload(t *testing.T) {
	d, err := harness.New(bin)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(d.Dir, "config.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	log := func() string {
		text, err := os.ReadFile(d.Log())
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	write("version = 3\nno_such_key = 1\n[debug]\nlevel = \"debug\"\n")
	d.Args = []string{"--config", file, "--log-level="}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	has(t, log(), "no_such_key", "line=2", "level=DEBUG")
	hup := func(says string) {
		t.Helper()
		before := strings.Count(log(), says)
		if err := syscall.Kill(d.PID(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		until(t, says, func() bool { return strings.Count(log(), says) > before })
	}
	write("version = 3\n[debug]\nlevel = \"warn\"\n[grpc]\nmax_recv_message_size = 1000000\n")
	hup("this key has changed and holds from the next start on")
	has(t, log(), "key=grpc.max_recv_message_size")
	write("version = 3\n[debug]\nlevel = 1\n")
	hup("cannot reload the configuration")
	quiet := log()
	u := &user{Daemon: d, t: t}
	u.fails(1, "images", "tag", "nosuch", "x") // which is in the log at level debug
	time.Sleep(50 * time.Millisecond)
	equal(t, "the log at level warn", log(), quiet)
	write("version = 3\n[debug]\nlevel = \"debug\"\n")
	hup("configuration reloaded")
	u.fails(1, "images", "tag", "nosuch", "x")
	until(t, "the log at level debug", func() bool { return strings.Contains(strings.TrimPrefix(log(), quiet), "nosuch") })
}
