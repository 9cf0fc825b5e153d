package shimapi

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestListen works below short directories and below some that sun_path cannot hold.
func TestListen(t *testing.T) {
	for name, dir := range map[string]string{"short": "a", "deep": strings.Repeat("long/", 40)} {
		t.Run(name, func(t *testing.T) {
			before := fds(t)
			path := filepath.Join(t.TempDir(), dir, "sock")
			l, err := Listen(path)
			if err != nil {
				t.Fatal(err)
			}
			fi, err := os.Stat(path)
			if err != nil || fi.Mode().Perm() != 0o600 || fi.Mode().Type() != os.ModeSocket {
				t.Errorf("mode %v, %v", fi.Mode(), err)
			}
			if fi, err := os.Stat(filepath.Dir(path)); err != nil || fi.Mode().Perm() != 0o711 {
				t.Errorf("mode of the directory %v, %v", fi.Mode(), err)
			}
			for _, address := range []string{path, "unix://" + path} {
				c, err := DialSocket(context.Background(), address)
				if err != nil {
					t.Fatal(err)
				}
				_ = c.Close()
			}
			if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another process serves it") || !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("a live socket is taken: %v", err)
			}
			_ = l.Close()
			if _, err := os.Stat(path); err != nil {
				t.Errorf("closing has unlinked it: %v", err)
			}
			if _, err := DialSocket(context.Background(), path); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("stale: %v", err)
			}
			again, err := Listen(path)
			if err != nil {
				t.Fatalf("a stale socket is not replaced: %v", err)
			}
			_ = again.Close()
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if _, err := DialSocket(context.Background(), path); !errors.Is(err, unix.ENOENT) {
				t.Errorf("missing: %v", err)
			}
			if after := fds(t); after > before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

// TestListenFails: what is not a socket is not removed, and the error names it.
func TestListenFails(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(dir, "sub")
	if err := os.MkdirAll(filepath.Join(sub, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, sub, filepath.Join(file, "s")} {
		if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "kept" {
		t.Errorf("the file is %q, %v", data, err)
	}
}

// TestSocketPath: names differ with all that they are made of, and fit sun_path below a usual state directory.
func TestSocketPath(t *testing.T) {
	seen := map[string]bool{}
	for _, state := range []string{"/run/managerd", "/run/other"} {
		for _, ns := range []string{"a", "b"} {
			for _, id := range []string{"a", "b", strings.Repeat("i", 76)} {
				p := SocketPath(state, ns, id)
				if seen[p] || len(p) > maxSunPath || p != SocketPath(state, ns, id) || filepath.Dir(p) != state+"/s" {
					t.Errorf("path of %s/%s in %s: %s", ns, id, state, p)
				}
				seen[p] = true
			}
		}
	}
}

func fds(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
