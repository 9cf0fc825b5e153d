package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

var when = time.Unix(1700000000, 0)

// archive makes a tar; what a header lacks is filled in.
func archive(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		body := []byte(nil)
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			body = []byte("body of " + h.Name)
			h.Size = int64(len(body))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if h.ModTime.IsZero() {
			h.ModTime = when
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name string) tar.Header { return tar.Header{Name: name} }
func dir(name string) tar.Header  { return tar.Header{Name: name, Typeflag: tar.TypeDir} }
func symlink(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}
}
func hardlink(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}
}

func apply(t *testing.T, root string, entries ...tar.Header) error {
	t.Helper()
	return Apply(context.Background(), root, bytes.NewReader(archive(t, entries...)), Limits{})
}

// tree lists what is in a directory: name → what it is. Attributes only with full.
func tree(t testing.TB, root string, full bool) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		s := e.Type().String()[:1]
		switch {
		case e.Type().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s = "f " + string(b)
		case e.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			s = "l " + target
		case e.Type()&fs.ModeDevice != 0:
			s = fmt.Sprintf("%s %d:%d", e.Type(), unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if full {
			at, err := os.Open(filepath.Dir(p))
			if err != nil {
				return err
			}
			defer func() { _ = at.Close() }()
			x, err := xattrs(int(at.Fd()), e.Name())
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %o %d:%d %d %v", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, x)
			if !e.IsDir() {
				s += fmt.Sprintf(" links %d", st.Nlink)
			}
		}
		out[rel] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func diffTrees(t *testing.T, got, want map[string]string) {
	t.Helper()
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if got[k] != want[k] {
			t.Errorf("%s: is %q, want %q", k, got[k], want[k])
		}
	}
	for _, k := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: is there: %q", k, got[k])
		}
	}
}

func TestAttributes(t *testing.T) {
	root := t.TempDir()
	long := strings.Repeat("long-name-", 20) + "/" + strings.Repeat("x", 200)
	err := apply(t, root,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o711, Uid: 5, Gid: 6, ModTime: time.Unix(1600000000, 0)},
		tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 7, Gid: 8, ModTime: time.Unix(1500000000, 500)},
		tar.Header{Name: "d/suid", Mode: 0o6755, Uid: 100000, Gid: 100001},
		tar.Header{Name: "d/none", Mode: 0o4000},
		hardlink("hard", "d/suid"),
		tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/absolute/../d", Uid: 3},
		tar.Header{Name: "fifo", Typeflag: tar.TypeFifo},
		tar.Header{Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
		tar.Header{Name: "blk", Typeflag: tar.TypeBlock, Devmajor: 7, Devminor: 300},
		tar.Header{Name: "x", PAXRecords: map[string]string{
			xattrPrefix + "user.colour":              "red\x00blue",
			xattrPrefix + "security.capability":      "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			xattrPrefix + "trusted.overlay.redirect": "/etc",
		}},
		file(long),
		tar.Header{Name: "old", ModTime: time.Unix(-1000, 0)},
	)
	if err != nil {
		t.Fatal(err)
	}
	got := tree(t, root, true)
	mode := func(p string, want uint32) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, p), &st); err != nil || st.Mode&0o7777 != want {
			t.Errorf("%s: mode %o (%v), want %o", p, st.Mode, err, want)
		}
	}
	mode(".", 0o711)
	mode("d", 0o1777)
	mode("d/suid", 0o6755)
	mode("d/none", 0o4000)
	mode("dev", 0o666)
	for p, part := range map[string]string{
		"hard": "100000:100001", "link": " 3:0 ", "d": " 7:8 1500000000", "old": " -1000 ",
		"x": "security.capability", "blk": "7:300", "d/suid": "links 2", long: "body of",
	} {
		if !strings.Contains(got[p], part) {
			t.Errorf("%s: %q lacks %q", p, got[p], part)
		}
	}
	if !strings.Contains(got["x"], "red\x00blue") {
		t.Errorf("x: %q", got["x"])
	}
	if n, err := unix.Lgetxattr(filepath.Join(root, "x"), "trusted.overlay.redirect", nil); err == nil {
		t.Errorf("an attribute of overlayfs came in with the layer, %d bytes", n)
	}
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil || st.Mtim.Sec != 1600000000 || st.Uid != 5 {
		t.Errorf("root: %+v, %v", st, err)
	}
}

func TestReplacing(t *testing.T) {
	root := t.TempDir()
	if err := apply(t, root, dir("d"), file("d/a"), file("f"), symlink("l", "d"), dir("keep"), file("keep/x"), file("h1"), hardlink("h2", "h1")); err != nil {
		t.Fatal(err)
	}
	if err := apply(t, root,
		file("d"),              // a directory with children becomes a file
		dir("f"), file("f/in"), // a file a directory
		dir("l"), file("l/in"), // a link to a directory is not followed when it is the entry itself
		dir("keep"), file("keep/y"), // a directory is kept
		hardlink("h1", "h2"),         // the same file already
		file("deep/er/missing/file"), // parents are made
	); err != nil {
		t.Fatal(err)
	}
	diffTrees(t, tree(t, root, false), map[string]string{
		"d": "f body of d", "f": "d", "f/in": "f body of f/in", "l": "d", "l/in": "f body of l/in",
		"keep": "d", "keep/x": "f body of keep/x", "keep/y": "f body of keep/y", "h1": "f body of h1", "h2": "f body of h1",
		"deep": "d", "deep/er": "d", "deep/er/missing": "d", "deep/er/missing/file": "f body of deep/er/missing/file",
	})
}

func TestWhiteouts(t *testing.T) {
	lower := []tar.Header{dir("d"), file("d/a"), file("d/b"), dir("d/sub"), file("d/sub/x"), file("f"), dir("e"), file("e/old"), symlink("s", "/")}
	for name, c := range map[string]struct {
		layer []tar.Header
		want  []string
	}{
		"file and directory": {[]tar.Header{file("d/.wh.a"), file(".wh.e")}, []string{"d", "d/b", "d/sub", "d/sub/x", "f", "s"}},
		"of nothing":         {[]tar.Header{file("d/.wh.nothing"), file("no/where/.wh.x"), file("f/.wh.x")}, []string{"d", "d/a", "d/b", "d/sub", "d/sub/x", "e", "e/old", "f", "s"}},
		"a link, not what it points to": {
			[]tar.Header{file(".wh.s")}, []string{"d", "d/a", "d/b", "d/sub", "d/sub/x", "e", "e/old", "f"},
		},
		"opaque": {[]tar.Header{dir("d"), file("d/.wh..wh..opq"), file("d/new")}, []string{"d", "d/new", "e", "e/old", "f", "s"}},
		"opaque comes last": {
			[]tar.Header{dir("d"), file("d/new"), file("d/sub/new"), file("d/.wh..wh..opq")}, []string{"d", "d/new", "d/sub", "d/sub/new", "e", "e/old", "f", "s"},
		},
		"whiteout after what replaces it": {
			[]tar.Header{dir("d"), file("d/new"), file(".wh.d")}, []string{"d", "d/new", "e", "e/old", "f", "s"},
		},
		"whiteout before what replaces it": {
			[]tar.Header{file(".wh.d"), dir("d"), file("d/new"), file(".wh.f"), file("f")}, []string{"d", "d/new", "e", "e/old", "f", "s"},
		},
		"opaque root": {[]tar.Header{file(".wh..wh..opq"), file("only")}, []string{"only"}},
		"aufs":        {[]tar.Header{dir(".wh..wh.plnk"), file(".wh..wh.aufs"), file(".wh.d")}, []string{"e", "e/old", "f", "s"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := apply(t, root, lower...); err != nil {
				t.Fatal(err)
			}
			if err := apply(t, root, c.layer...); err != nil {
				t.Fatal(err)
			}
			if got := slices.Sorted(maps.Keys(tree(t, root, false))); !slices.Equal(got, c.want) {
				t.Errorf("is  %q\nwant %q", got, c.want)
			}
		})
	}
}

// TestMalicious: whatever a layer says, nothing outside of the root changes, nor can be read through it.
func TestMalicious(t *testing.T) {
	for name, c := range map[string]struct {
		layer   []tar.Header
		refused bool
		inside  string // a file that must be there then
	}{
		"dot dot":                           {[]tar.Header{file("../escaped")}, true, ""},
		"dot dot inside":                    {[]tar.Header{file("a/../../escaped")}, true, ""},
		"dot dot directory":                 {[]tar.Header{dir("../escaped")}, true, ""},
		"only dots":                         {[]tar.Header{dir("..")}, true, ""},
		"absolute stays inside":             {[]tar.Header{file("/outside/escaped")}, false, "outside/escaped"},
		"harmless dots":                     {[]tar.Header{file("a/../b")}, false, "b"},
		"through an absolute link":          {[]tar.Header{symlink("l", "/outside"), dir("outside"), file("l/escaped")}, false, "outside/escaped"},
		"through a relative link":           {[]tar.Header{symlink("l", "../../../../../outside"), file("l/escaped")}, false, "outside/escaped"},
		"through a link to the real place":  {[]tar.Header{symlink("l", "$OUTSIDE"), file("l/escaped")}, false, ""},
		"through two links":                 {[]tar.Header{symlink("a", ".."), symlink("b", "a/outside"), file("b/escaped")}, false, "outside/escaped"},
		"over a link":                       {[]tar.Header{symlink("l", "$OUTSIDE/secret"), file("l")}, false, "l"},
		"directory over a link":             {[]tar.Header{symlink("l", "$OUTSIDE"), dir("l"), file("l/escaped")}, false, "l/escaped"},
		"attributes over a link":            {[]tar.Header{symlink("l", "$OUTSIDE/secret"), {Name: "l", Typeflag: tar.TypeSymlink, Linkname: "$OUTSIDE/secret", Mode: 0o777, Uid: 1234}}, false, ""},
		"hard link out":                     {[]tar.Header{hardlink("h", "../outside/secret")}, true, ""},
		"hard link to absolute":             {[]tar.Header{hardlink("h", "$OUTSIDE/secret")}, true, ""},
		"hard link through a link":          {[]tar.Header{symlink("l", "$OUTSIDE"), hardlink("h", "l/secret"), file("h")}, true, ""},
		"hard link to a link, then over it": {[]tar.Header{symlink("l", "$OUTSIDE/secret"), hardlink("h", "l"), file("h")}, false, "h"},
		"hard link to a directory":          {[]tar.Header{dir("d"), hardlink("h", "d")}, true, ""},
		"hard link to nothing":              {[]tar.Header{hardlink("h", "nothing")}, true, ""},
		"hard link to the root":             {[]tar.Header{hardlink("h", ".")}, true, ""},
		"hard link to itself":               {[]tar.Header{file("h"), hardlink("h", "h")}, false, "h"},
		"whiteout of the parent":            {[]tar.Header{file("a/.wh...")}, true, ""},
		"whiteout of itself":                {[]tar.Header{file("a/.wh..")}, true, ""},
		"whiteout of nothing":               {[]tar.Header{file(".wh.")}, true, ""},
		"whiteout through a link":           {[]tar.Header{symlink("l", "$OUTSIDE"), file("l/.wh.secret")}, false, ""},
		"opaque through a link":             {[]tar.Header{symlink("l", "$OUTSIDE"), file("l/.wh..wh..opq")}, false, ""},
		"link loop":                         {[]tar.Header{symlink("a", "b"), symlink("b", "a"), file("a/f")}, true, ""},
		"dangling loop":                     {[]tar.Header{symlink("a", "a/b"), file("a/f")}, true, ""},
		"file as directory":                 {[]tar.Header{file("f"), file("f/in")}, true, ""},
		"root as link":                      {[]tar.Header{symlink(".", "$OUTSIDE")}, true, ""},
		"link without target":               {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink}}, true, ""},
		"long component":                    {[]tar.Header{file(strings.Repeat("n", 300))}, true, ""},
		"proc":                              {[]tar.Header{symlink("l", "/proc/self/root/tmp"), file("l/escaped")}, false, ""},
		"unknown type":                      {[]tar.Header{{Name: "x", Typeflag: 'Z'}}, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			outside, root := filepath.Join(base, "outside"), filepath.Join(base, "root")
			for _, d := range []string{outside, root} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600); err != nil {
				t.Fatal(err)
			}
			before := tree(t, outside, true)
			for i := range c.layer {
				c.layer[i].Linkname = strings.ReplaceAll(c.layer[i].Linkname, "$OUTSIDE", outside)
			}
			err := apply(t, root, c.layer...)
			if c.refused != (err != nil) {
				t.Errorf("error %v, refused must be %t", err, c.refused)
			}
			if err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("error is not InvalidArgument: %v", err)
			}
			diffTrees(t, tree(t, outside, true), before)
			if list, _ := os.ReadDir(base); len(list) != 2 {
				t.Errorf("beside the root there is %v", list)
			}
			if c.inside != "" {
				if st, err := os.Lstat(filepath.Join(root, c.inside)); err != nil || !st.Mode().IsRegular() {
					t.Errorf("%s: %v", c.inside, err)
				}
			}
			for p, s := range tree(t, root, false) {
				if s == "f secret" {
					t.Errorf("%s is the file outside", p)
				}
			}
		})
	}
}

func TestCutShort(t *testing.T) {
	whole := archive(t, dir("d"), file("d/a"), file("b"))
	for _, n := range []int{1, 100, 511, 513, 1030, 512*3 + 1} {
		err := Apply(context.Background(), t.TempDir(), bytes.NewReader(whole[:n]), Limits{})
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "cut short") {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if err := Apply(context.Background(), t.TempDir(), strings.NewReader(strings.Repeat("no tar ", 200)), Limits{}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("no tar: %v", err)
	}
	broken := errors.New("disk is on fire")
	if err := Apply(context.Background(), t.TempDir(), io.MultiReader(bytes.NewReader(whole[:700]), errReader{broken}), Limits{}); !errors.Is(err, broken) || errdefs.IsInvalidArgument(err) {
		t.Errorf("source that fails: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Apply(ctx, t.TempDir(), bytes.NewReader(whole), Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

// TestRoundTrip: what Diff writes of two trees makes the first into the second.
func TestRoundTrip(t *testing.T) {
	lower, upper, replica := t.TempDir(), t.TempDir(), t.TempDir()
	base := []tar.Header{
		dir("same"), file("same/f"), dir("gone"), file("gone/f"), file("removed"), file("changed"), dir("mode"), file("mode/f"),
		dir("becomes-file"), file("becomes-file/f"), file("becomes-dir"), symlink("link", "same"), file("x"), hardlink("h1", "x"),
		{Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
	}
	for _, root := range []string{lower, upper, replica} {
		if err := apply(t, root, base...); err != nil {
			t.Fatal(err)
		}
	}
	if err := apply(t, upper,
		file(".wh.gone"), file(".wh.removed"), tar.Header{Name: "changed", ModTime: when.Add(time.Hour)},
		tar.Header{Name: "mode", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 9}, file("becomes-file"), dir("becomes-dir"), file("becomes-dir/f"),
		symlink("link", "elsewhere"), dir("new"), file("new/a"), hardlink("new/b", "new/a"), dir("new/empty"),
		tar.Header{Name: "new/fifo", Typeflag: tar.TypeFifo}, tar.Header{Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 5},
		tar.Header{Name: "same/deep", PAXRecords: map[string]string{xattrPrefix + "user.a": "b"}, Mode: 0o4711},
		tar.Header{Name: strings.Repeat("l", 150), Uid: 3_000_000},
	); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := Diff(context.Background(), Trees{Lower: lower, Upper: upper}, &b); err != nil {
		t.Fatal(err)
	}
	var names []string
	for r := tar.NewReader(bytes.NewReader(b.Bytes())); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	want := []string{".wh.gone", ".wh.removed", "becomes-dir/", "becomes-dir/f", "becomes-file", "changed", "dev", "link", strings.Repeat("l", 150), "mode/",
		"new/", "new/a", "new/b", "new/empty/", "new/fifo", "same/", "same/deep"}
	slices.Sort(want)
	if slices.Sort(names); !slices.Equal(names, want) {
		t.Errorf("layer has %q\nwant      %q", names, want)
	}
	if err := Apply(context.Background(), replica, bytes.NewReader(b.Bytes()), Limits{}); err != nil {
		t.Fatal(err)
	}
	diffTrees(t, tree(t, replica, true), tree(t, upper, true))

	b.Reset()
	if err := Diff(context.Background(), Trees{Lower: replica, Upper: upper}, &b); err != nil {
		t.Fatal(err)
	}
	if b.Len() != 1024 {
		t.Errorf("trees that are alike differ by %d bytes of tar", b.Len())
	}
	// A time of whole seconds proves nothing: content is compared.
	f := filepath.Join(replica, "same/f")
	if err := os.WriteFile(f, []byte("BODY of same/f"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(f, when, when); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	if err := Diff(context.Background(), Trees{Lower: upper, Upper: replica}, &b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b.Bytes(), []byte("BODY of")) {
		t.Error("a change that hides behind its time was not found")
	}
}

// TestForeignTar: archives of GNU tar, in each of its formats, with holes, long names and links.
func TestForeignTar(t *testing.T) {
	src := t.TempDir()
	if err := apply(t, src, dir("d"), file("d/a"), symlink("l", strings.Repeat("t", 120)), hardlink("h", "d/a"), file(strings.Repeat("n", 180))); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(src, "holes"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("end"), 64<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(f.Name(), when, when); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"gnu", "pax"} {
		t.Run(format, func(t *testing.T) {
			out, err := exec.Command("tar", "-C", src, "--format="+format, "--sparse", "--numeric-owner", "-c", ".").Output()
			if err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			if err := Apply(context.Background(), root, bytes.NewReader(out), Limits{}); err != nil {
				t.Fatal(err)
			}
			diffTrees(t, tree(t, root, true), tree(t, src, true))
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(root, "holes"), &st); err != nil || st.Blocks > 2048 {
				t.Errorf("the holes take %d blocks (%v)", st.Blocks, err)
			}
		})
	}
}
