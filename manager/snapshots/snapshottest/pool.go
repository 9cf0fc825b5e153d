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

// Command runs a program that must succeed, and gives what it says, without the last newline.
func Command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// sparse makes a file of that many bytes.
func sparse(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// poolName is one that nobody else has.
func poolName(dir string) string {
	return fmt.Sprintf("snapshottest-%d-%s", unix.Getpid(), filepath.Base(filepath.Dir(dir)))
}

// ThinPool makes a device-mapper thin pool for the time of the test, with data of that many bytes, and gives its name. It is
// for where the kernel has device-mapper.
func ThinPool(t *testing.T, data int64) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { NoLoops(t, dir) })
	device := func(file string, size int64) string {
		path := filepath.Join(dir, file)
		sparse(t, path, size)
		loop := Command(t, "losetup", "--find", "--show", path)
		t.Cleanup(func() { Command(t, "losetup", "--detach", loop) })
		return loop
	}
	meta, store := device("meta", 16<<20), device("data", data)
	pool := poolName(dir)
	pool = pool[:min(len(pool), 100)]
	// Blocks of 64 KiB; errors, and no waiting, when they run out.
	Command(t, "dmsetup", "create", pool, "--table", fmt.Sprintf("0 %d thin-pool %s %s 128 0 2 skip_block_zeroing error_if_no_space", data/512, meta, store))
	t.Cleanup(func() {
		out := Command(t, "dmsetup", "ls", "--target", "thin")
		for line := range strings.Lines(out) {
			if name, _, _ := strings.Cut(line, "\t"); strings.HasPrefix(name, pool+"-") {
				Command(t, "dmsetup", "remove", "--retry", name)
			}
		}
		Command(t, "dmsetup", "remove", "--retry", pool)
	})
	return pool
}

// ZFS says why there is no ZFS on this machine; nil: there is.
func ZFS() error {
	if _, err := exec.LookPath("zpool"); err != nil {
		return err
	}
	_, err := os.Stat("/dev/zfs")
	return err
}

// Zpool makes a pool of ZFS for the time of the test, in a file of that many bytes. It gives its dataset, and the directory
// in which that is mounted as "root". It skips the test where there is no ZFS.
func Zpool(t *testing.T, size int64) (dataset, dir string) {
	t.Helper()
	if err := ZFS(); err != nil {
		t.Skip(err)
	}
	dir = t.TempDir()
	file := filepath.Join(dir, "disk")
	dataset = poolName(dir)
	sparse(t, file, size)
	Command(t, "zpool", "create", "-m", filepath.Join(dir, "root"), dataset, file)
	t.Cleanup(func() { Command(t, "zpool", "destroy", "-f", dataset) })
	return dataset, dir
}
