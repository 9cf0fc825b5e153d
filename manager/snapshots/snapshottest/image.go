package snapshottest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"

	"github.com/managerd/managerd/shimapi/mount"
)

// Image makes a sparse file of size bytes with a file system in it; it skips the test where there is no mkfs for that.
func Image(t *testing.T, path, fstype string, size int64, options ...string) {
	t.Helper()
	mkfs, err := exec.LookPath("mkfs." + fstype)
	if err != nil {
		t.Skipf("mkfs.%s is not installed", fstype)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, append(options, path)...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
}

// On mounts a fresh file system for the time of the test and gives a directory on it. It skips the test where the kernel
// does not know the file system.
func On(t *testing.T, fstype string, size int64, options ...string) string {
	t.Helper()
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(known), "\t"+fstype+"\n") && exec.Command("modprobe", fstype).Run() != nil {
		t.Skipf("this kernel has no %s", fstype)
	}
	dir := t.TempDir()
	image, at := filepath.Join(dir, "image"), filepath.Join(dir, "fs")
	Image(t, image, fstype, size, options...)
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := mount.Mount([]*types.Mount{{Type: fstype, Source: image, Options: []string{"loop"}}}, at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.Unmount(at); err != nil {
			t.Error(err)
		}
		NoLoops(t, dir)
	})
	test := filepath.Join(at, "test")
	if err := os.Mkdir(test, 0o755); err != nil {
		t.Fatal(err)
	}
	return test
}

// NoLoops waits until the kernel has freed the loop devices of files below dir.
func NoLoops(t *testing.T, dir string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		left := ""
		found, _ := filepath.Glob("/sys/block/loop*/loop/backing_file") // the pattern is right
		for _, f := range found {
			if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir+"/") {
				left = f + ": " + string(b)
			}
		}
		if left == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a loop device was left: %s", left)
		}
	}
}
