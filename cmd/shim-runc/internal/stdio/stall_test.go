package stdio

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/test/hungfs"
)

// TestStalledTerminal: a client that stops reading a terminal's output stops that, is told of, and gets all of it when it
// goes on.
func TestStalledTerminal(t *testing.T) {
	dir, cfg := mkfifos(t)
	cfg.Terminal, cfg.Stdin = true, ""
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	client, err := os.OpenFile(filepath.Join(dir, "out"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	master, slave := openPTY(t)
	if err := s.SetConsole(master); err != nil {
		t.Fatal(err)
	}
	const lines = 100000
	written := make(chan error, 1)
	go func() {
		_, err := slave.WriteString(numbers(lines))
		written <- err
		_ = slave.Close()
	}()
	until(t, "it is said that the client does not read", func() bool { return s.Outputs()[0].Waiting == unreadClient })
	got, err := io.ReadAll(client)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.ReplaceAll(numbers(lines), "\n", "\r\n"); !bytes.Equal(got, []byte(want)) {
		t.Errorf("%d bytes of %d", len(got), len(want))
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// TestHungWrite: a write into a sink that does not return holds up neither the end of a process nor Close, which says so;
// when it answers after all, everything is there and nothing of ours is left.
func TestHungWrite(t *testing.T) {
	for _, scheme := range []string{"file", "json-file"} {
		for _, closes := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, closes %v", scheme, closes), func(t *testing.T) {
				fs := hungfs.Mount(t)
				path := filepath.Join(fs.Dir, "log")
				dir := t.TempDir()
				s, cmd := run(t, Config{Dir: dir, Stdout: scheme + "://" + path, Stderr: scheme + "://" + path}, "sleep 0.2; seq 1 20000")
				fs.Hang(t, true)
				begin := time.Now()
				_ = cmd.Wait()
				until(t, "it is said", func() bool { return s.Outputs()[0].Waiting == "a call into it does not return" })
				ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
				defer cancel()
				if _, err := s.ReopenLogs(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), path) {
					t.Errorf("reopen: %v", err)
				}
				if closes {
					err := s.Close()
					if took := time.Since(begin); took > 20*time.Second {
						t.Errorf("it took %v", took)
					}
					if err == nil || !strings.Contains(err.Error(), scheme+" (a call into it does not return)") {
						t.Errorf("close: %v", err)
					}
					if left, _ := os.ReadDir(dir); len(left) != 0 {
						t.Errorf("left behind: %v", left)
					}
					fs.Hang(t, false) // the end of the package looks for what is left
					return
				}
				fs.Hang(t, false)
				s.Drain(30 * time.Second)
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				got := mustRead(t, path)
				if scheme == "json-file" {
					got = logText(t, path, "stdout")
				}
				if got != numbers(20000) {
					t.Errorf("%d bytes of %d", len(got), len(numbers(20000)))
				}
			})
		}
	}
}

// TestReopenFile: the output of a process whose shim, of an older version, kept no log of its file goes on into that.
func TestReopenFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	fifo := filepath.Join(dir, ".init.stdout")
	if err := errors.Join(unix.Mkfifo(fifo, 0o600), os.WriteFile(path, []byte("before\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	container, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := container.WriteString("after\n"); err != nil {
		t.Fatal(err)
	}
	s, err := Reopen(Config{Dir: dir, Stdout: "file://" + path}, map[string]*os.File{}, false)
	if err != nil {
		t.Fatal(err)
	}
	_ = container.Close()
	s.Drain(10 * time.Second)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := mustRead(t, path); got != "before\nafter\n" {
		t.Errorf("%q", got)
	}
}
