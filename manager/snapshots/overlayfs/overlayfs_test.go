package overlayfs_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

func open(root string) (snapshots.Backend, error) { return overlayfs.New(root, overlayfs.Options{}) }

// TestMounts: what clients and node tools expect to see.
func TestMounts(t *testing.T) {
	dir := t.TempDir()
	e, _ := snapshottest.Open(t, dir, open)
	e.Prepare("a", "", func(string) {})
	e.Prepare("b", "a", func(string) {})
	at := func(s string) string { return strings.ReplaceAll(s, "@", filepath.Join(dir, "root/snapshots")) }
	check := func(key, parent string, view bool, typ, source string, options ...string) {
		t.Helper()
		make := e.S.Prepare
		if view {
			make = e.S.View
		}
		m, err := make(e.Ctx, key, parent, nil)
		e.Must(err)
		var got []string
		for _, o := range m[0].Options {
			if o != "index=off" && o != "userxattr" {
				got = append(got, o)
			}
		}
		if len(m) != 1 || m[0].Type != typ || m[0].Source != at(source) || strings.Join(got, " ") != at(strings.Join(options, " ")) {
			t.Errorf("%s: %v", key, m)
		}
	}
	check("k3", "", false, "bind", "@/3/fs", "rw", "rbind")
	check("k4", "", true, "bind", "@/4/fs", "ro", "rbind")
	check("k5", "a", true, "bind", "@/1/fs", "ro", "rbind")
	check("k6", "b", true, "overlay", "overlay", "lowerdir=@/2/fs:@/1/fs")
	check("k7", "b", false, "overlay", "overlay", "workdir=@/7/work", "upperdir=@/7/fs", "lowerdir=@/2/fs:@/1/fs")
}

// TestAwkwardRoot: any path may be the daemon's root, also one with what overlayfs gives a meaning.
func TestAwkwardRoot(t *testing.T) {
	e, _ := snapshottest.Open(t, filepath.Join(t.TempDir(), `a:b,c\d`), open)
	e.Prepare("a", "", func(r string) { e.Must(os.WriteFile(filepath.Join(r, "a"), nil, 0o644)) })
	e.Prepare("b", "a", func(r string) { e.Must(os.WriteFile(filepath.Join(r, "b"), nil, 0o644)) })
	m, err := e.S.Prepare(e.Ctx, "k", "b", nil)
	e.Must(err)
	e.On(m, func(r string) {
		for _, f := range []string{"a", "b"} {
			_, err := os.Stat(filepath.Join(r, f))
			e.Must(err)
		}
	})
}

// BenchmarkPrepare: directories and one record. The commit's fsync is most of it.
func BenchmarkPrepare(b *testing.B) {
	snapshottest.BenchmarkPrepare(b, open)
}
