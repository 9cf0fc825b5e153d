package early

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestAttach: the write is made to the cgroup that we are in, on machines that have the hierarchy, and moves nobody.
func TestAttach(t *testing.T) {
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Contains(before, []byte(":"+hierarchy+":"))
	if got := attach("/sys/fs/cgroup", "/proc/self/cgroup"); got != want {
		t.Errorf("written: %v", got)
	}
	if after, err := os.ReadFile("/proc/self/cgroup"); err != nil || !bytes.Equal(after, before) {
		t.Errorf("moved, from\n%s to\n%s (%v)", before, after, err)
	}
}

// TestWhere: the writer names itself in the file of its own cgroup; where there is none, nothing is made.
func TestWhere(t *testing.T) {
	dir := t.TempDir()
	self := filepath.Join(dir, "self")
	procs := filepath.Join(dir, hierarchy, "a:b", "cgroup.procs")
	if err := os.WriteFile(self, []byte("12:cpuset:/x\n9:freezer:/a:b\n0::/y\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if attach(dir, self) {
		t.Error("written to nothing")
	}
	if err := os.MkdirAll(filepath.Dir(procs), 0o700); err != nil {
		t.Fatal(err)
	}
	if attach(dir, self) {
		t.Error("made a file")
	}
	if err := os.WriteFile(procs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !attach(dir, self) {
		t.Error("not written")
	}
	if got, err := os.ReadFile(procs); err != nil || string(got) != "0" {
		t.Errorf("written: %q, %v", got, err)
	}
	if attach(dir, filepath.Join(dir, "nosuch")) {
		t.Error("written by nobody")
	}
}
