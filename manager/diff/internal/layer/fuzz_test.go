package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzApply: no tar leaves the root, or makes Apply panic or hang. What Diff makes of a tree that was applied makes that tree.
func FuzzApply(f *testing.F) {
	for _, entries := range [][]tar.Header{
		{dir("d"), file("d/a"), symlink("l", "/"), hardlink("h", "d/a")},
		{file("../x"), file("/abs"), symlink("l", "../.."), file("l/x")},
		{symlink("a", "/outside"), file("a/.wh.secret"), file("a/.wh..wh..opq")},
		{file(".wh.a"), file("d/.wh..wh..opq"), hardlink("h", "../outside/secret")},
		{{Name: "x", PAXRecords: map[string]string{xattrPrefix + "user.a": "b"}}, {Name: "f", Typeflag: tar.TypeFifo}},
		{file(strings.Repeat("long/", 60) + "name")},
		{file("\xff\xfe"), hardlink("b", "\xff\xfe"), symlink("s", "\x80"), hardlink("t", "s")},
		{{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, dir("c"), file("c/d/e"), file("c/.wh.d")},
		{{Name: "big", Uid: 1 << 22, Gid: 4_000_000_000, Mode: 0o7777, Format: tar.FormatPAX}, {Name: "x", PAXRecords: map[string]string{xattrPrefix + "user.x": "\x00"}}},
	} {
		f.Add(archive(f, entries...))
	}
	f.Add(sparseBomb(f, 1<<16))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			t.Skip("large inputs find nothing that small ones do not")
		}
		base := t.TempDir()
		root := filepath.Join(base, "root")
		outside := filepath.Join(base, "outside")
		for _, d := range []string{root, outside} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
		before := tree(t, outside, true)
		limits := Limits{Bytes: 1 << 20, Entries: 1000}
		err := Apply(context.Background(), root, bytes.NewReader(data), limits)
		if after := tree(t, outside, true); !maps.Equal(before, after) {
			t.Errorf("outside changed: %v", after)
		}
		if list, _ := os.ReadDir(base); len(list) != 2 {
			t.Errorf("beside the root: %v", list)
		}
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := Diff(context.Background(), Trees{Upper: root}, &again); err != nil {
			t.Fatal(err)
		}
		replica := filepath.Join(base, "replica")
		if err := os.Mkdir(replica, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := Apply(context.Background(), replica, &again, Limits{}); err != nil {
			t.Fatalf("what Diff makes of it cannot be applied: %v", err)
		}
		diffTrees(t, tree(t, replica, true), tree(t, root, true))
	})
}
