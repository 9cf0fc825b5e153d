package snapshottest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// ThinPool makes a device-mapper thin pool for the time of the test, with data of that many bytes, and gives its name. It is
// for where the kernel has device-mapper.
func ThinPool(t *testing.T, data int64) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { NoLoops(t, dir) })
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	device := func(file string, size int64) string {
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		loop := run("losetup", "--find", "--show", path)
		t.Cleanup(func() { run("losetup", "--detach", loop) })
		return loop
	}
	meta, store := device("meta", 16<<20), device("data", data)
	pool := fmt.Sprintf("snapshottest-%d-%s", unix.Getpid(), filepath.Base(filepath.Dir(dir)))
	pool = pool[:min(len(pool), 100)]
	// Blocks of 64 KiB; errors, and no waiting, when they run out.
	run("dmsetup", "create", pool, "--table", fmt.Sprintf("0 %d thin-pool %s %s 128 0 2 skip_block_zeroing error_if_no_space", data/512, meta, store))
	t.Cleanup(func() {
		out := run("dmsetup", "ls", "--target", "thin")
		for line := range strings.Lines(out) {
			if name, _, _ := strings.Cut(line, "\t"); strings.HasPrefix(name, pool+"-") {
				run("dmsetup", "remove", "--retry", name)
			}
		}
		run("dmsetup", "remove", "--retry", pool)
	})
	return pool
}
