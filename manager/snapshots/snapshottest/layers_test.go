package snapshottest_test

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
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

// TestLayers: over every snapshotter, a layer with every feature makes the tree that it describes; what Diff makes of two
// snapshots is the same bytes over each and each time, and makes the one into the other over every other one.
func TestLayers(t *testing.T) {
	b := &blobs{data: map[digest.Digest][]byte{}}
	parent := b.add(tarOf(t, func(r row) []entry { return append([]entry{dir(r.dir())}, r.parent...) }))
	layer := b.add(tarOf(t, func(r row) []entry { return r.layer }))
	trees := map[string][2]tree{}              // that the layer and the edits make, by column
	made := map[string][2]ocispec.Descriptor{} // what Diff makes of that
	here := chosen()

	t.Run("Apply", func(t *testing.T) {
		for _, c := range here {
			t.Run(c.Name, func(t *testing.T) {
				l := openLayers(t, c, b)
				l.make("", "parent", l.unpack(parent))
				var is [2]tree
				var d [2]ocispec.Descriptor
				d[0] = l.make("parent", "child", func(m []*types.Mount) {
					l.unpack(layer)(m)
					l.On(m, func(root string) {
						for _, r := range rows {
							t.Run(r.name, func(t *testing.T) { r.verify(t, filepath.Join(root, r.dir())) })
						}
						is[0] = look(t, root, true)
					})
				})
				l.On(l.view("child"), func(root string) {
					same(t, "once it is committed", look(t, root, true), is[0])
				})
				d[1] = l.make("child", "edited", func(m []*types.Mount) {
					l.On(m, func(root string) {
						l.edit(root)
						is[1] = look(t, root, true)
					})
				})
				trees[c.Name], made[c.Name] = is, d
			})
		}
	})
	t.Run("Diff", func(t *testing.T) {
		for _, c := range here {
			t.Run(c.Name, func(t *testing.T) {
				mine, ok := made[c.Name]
				if !ok {
					t.Skip("it is not to be had here")
				}
				l := openLayers(t, c, b)
				l.make("", "parent", l.unpack(parent))
				l.make("parent", "child", l.unpack(layer))
				done := map[string]bool{}
				for _, from := range slices.Sorted(maps.Keys(made)) {
					for i, on := range []string{"parent", "child"} {
						d := made[from][i]
						if d.Digest != mine[i].Digest {
							same(t, "the layer that is made over "+from+" on "+on, b.list(t, d.Digest), b.list(t, mine[i].Digest))
						}
						name := on + " " + d.Digest.String()
						if done[name] {
							continue
						}
						done[name] = true
						l.make(on, name, func(m []*types.Mount) {
							l.unpack(d)(m)
							l.On(m, func(root string) {
								same(t, "what was made over "+from+" on "+on+", applied", look(t, root, true), trees[from][i])
							})
						})
					}
				}
			})
		}
	})
}

// TestDiffMounted: of what a container that runs has written so far a layer can be made.
func TestDiffMounted(t *testing.T) {
	b := &blobs{data: map[digest.Digest][]byte{}}
	for _, c := range chosen() {
		t.Run(c.Name, func(t *testing.T) {
			l := openLayers(t, c, b)
			l.Prepare("parent", "", func(root string) { l.Must(os.WriteFile(filepath.Join(root, "below"), nil, 0o644)) })
			m, err := l.S.Prepare(l.Ctx, "k", "parent", nil)
			l.Must(err)
			l.On(m, func(root string) {
				write(l.Env, root, "written")
				if list := b.list(t, l.diff(l.view("parent"), m).Digest); len(list) != 1 || list["written"] == "" {
					t.Errorf("the layer: %v", list)
				}
				write(l.Env, root, "later")
			})
		})
	}
}

// layers are a store and where its layers come from.
type layers struct {
	*snapshottest.Env
	blobs *blobs
}

func openLayers(t *testing.T, c snapshottest.Column, b *blobs) layers {
	e, _ := snapshottest.Open(t, c.Dir(t), c.Open)
	return layers{e, b}
}

// make makes a snapshot on parent, which fn changes, and gives the layer that Diff makes of it: the same one twice, and
// once it is committed.
func (l layers) make(parent, name string, fn func(m []*types.Mount)) ocispec.Descriptor {
	l.T.Helper()
	m, err := l.S.Prepare(l.Ctx, name+" active", parent, nil)
	l.Must(err)
	fn(m)
	var lower []*types.Mount
	if parent != "" {
		lower = l.view(parent)
	}
	d := l.diff(lower, m)
	again := l.diff(lower, m)
	l.Must(l.S.Commit(l.Ctx, name, name+" active", nil))
	committed := l.diff(lower, l.view(name))
	for what, other := range map[string]ocispec.Descriptor{"a second time": again, "once it is committed": committed} {
		if d.Digest != other.Digest {
			same(l.T, name+" makes another layer "+what, l.blobs.list(l.T, other.Digest), l.blobs.list(l.T, d.Digest))
			l.T.Errorf("%s makes another layer %s", name, what)
		}
	}
	return d
}

func (l layers) diff(lower, upper []*types.Mount) ocispec.Descriptor {
	l.T.Helper()
	d, err := diff.Diff(l.Ctx, l.blobs, lower, upper, diff.Options{MediaType: ocispec.MediaTypeImageLayer})
	l.Must(err)
	return d
}

// view gives the mounts of a committed snapshot.
func (l layers) view(name string) []*types.Mount {
	l.T.Helper()
	key := "view of " + name
	m, err := l.S.Mounts(l.Ctx, key)
	if errdefs.IsNotFound(err) {
		m, err = l.S.View(l.Ctx, key, name, nil)
	}
	l.Must(err)
	return m
}

func (l layers) unpack(d ocispec.Descriptor) func(m []*types.Mount) {
	return func(m []*types.Mount) {
		_, err := diff.Apply(l.Ctx, l.blobs, d, m, diff.ApplyOptions{})
		l.Must(err)
	}
}

// edit makes the changes of all rows; what they change is of the time later.
func (l layers) edit(root string) {
	before := map[string]unix.Timespec{}
	times := func(fn func(p string, st *unix.Stat_t)) {
		l.Must(filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
			var st unix.Stat_t
			if err == nil {
				err = unix.Lstat(p, &st)
			}
			if err == nil && p != root {
				fn(p, &st)
			}
			return err
		}))
	}
	times(func(p string, st *unix.Stat_t) { before[p] = st.Mtim })
	for _, r := range rows {
		if r.edit != nil {
			l.Must(r.edit(filepath.Join(root, r.dir())))
		}
	}
	at := []unix.Timespec{{Sec: later.Unix()}, {Sec: later.Unix()}}
	times(func(p string, st *unix.Stat_t) {
		if was, ok := before[p]; !ok || was != st.Mtim {
			l.Must(unix.UtimesNanoAt(unix.AT_FDCWD, p, at, unix.AT_SYMLINK_NOFOLLOW))
		}
	})
}

// verify compares a row's directory with what it is to be.
func (r row) verify(t *testing.T, root string) {
	want := tree{}
	for name, is := range r.want {
		want[name] = strings.ReplaceAll(is, "$", r.dir())
	}
	got := look(t, root, false)
	if got["."] == "dir" {
		delete(got, ".")
	}
	same(t, "the tree", got, want)
	if r.check != nil {
		r.check(t, root)
	}
}

func same(t *testing.T, what string, got, want tree) {
	t.Helper()
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if got[k] != want[k] {
			t.Errorf("%s: %q is %q, want %q", what, k, got[k], want[k])
		}
	}
	for _, k := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %q is there: %q", what, k, got[k])
		}
	}
}

// look describes a tree: what each name is, and of its attributes those that a layer's entry does not have by itself.
// Times are cut to seconds if so wanted, as Diff cuts them; the root is left out then.
func look(t *testing.T, root string, seconds bool) tree {
	t.Helper()
	out := tree{}
	names := map[[2]uint64]string{} // of files with several
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if kind := st.Mode & unix.S_IFMT; kind == unix.S_IFSOCK || name == "lost+found" || name == "." && seconds {
			return nil
		} else if kind != unix.S_IFDIR && st.Nlink > 1 {
			id := [2]uint64{st.Dev, st.Ino}
			if first, ok := names[id]; ok {
				out[name] = "is " + first
				return nil
			}
			names[id] = name
		}
		out[name], err = describe(p, &st, seconds)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func describe(p string, st *unix.Stat_t, seconds bool) (string, error) {
	var s string
	mode := uint32(0o644)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		s, mode = "dir", 0o755
	case unix.S_IFLNK:
		target, err := os.Readlink(p)
		if err != nil {
			return "", err
		}
		s, mode = "-> "+target, st.Mode&0o7777
	case unix.S_IFCHR:
		s = fmt.Sprintf("char %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFBLK:
		s = fmt.Sprintf("block %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		s = "fifo"
	default:
		b, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		if s = string(b); len(b) > 1000 {
			s = fmt.Sprintf("%d bytes %s", len(b), digest.FromBytes(b))
		}
	}
	if m := st.Mode & 0o7777; m != mode {
		s += fmt.Sprintf(" mode=%o", m)
	}
	if st.Uid != 0 || st.Gid != 0 {
		s += fmt.Sprintf(" owner=%d:%d", st.Uid, st.Gid)
	}
	if seconds {
		s += fmt.Sprintf(" time=%d", st.Mtim.Sec)
	} else if st.Mtim.Sec != when.Unix() || st.Mtim.Nsec != 0 {
		s += fmt.Sprintf(" time=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
	}
	return attributes(p, s)
}

func attributes(p, s string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return s, nil
	}
	if err != nil {
		return "", fmt.Errorf("listxattr %s: %w", p, err)
	}
	names := strings.Split(string(buf[:n]), "\x00")
	slices.Sort(names)
	for _, name := range names {
		if !strings.HasPrefix(name, "user.") && name != "security.capability" {
			continue
		}
		n, err := unix.Lgetxattr(p, name, buf)
		if err != nil {
			return "", fmt.Errorf("getxattr %s: %w", p, err)
		}
		s += fmt.Sprintf(" %s=%q", name, buf[:n])
	}
	return s, nil
}

// tarOf makes one layer of all rows.
func tarOf(t *testing.T, of func(r row) []entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, r := range rows {
		for _, e := range of(r) {
			if e.Name != r.dir()+"/" {
				e.Name = r.dir() + "/" + e.Name
			}
			e.Linkname = strings.ReplaceAll(e.Linkname, "$", r.dir())
			if err := e.write(&b, w); err != nil {
				t.Fatalf("%s: %s: %v", r.name, e.Name, err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// blobs is a content store in memory.
type blobs struct{ data map[digest.Digest][]byte }

func (b *blobs) add(data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	b.data[d] = data
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: int64(len(data))}
}

// list describes the entries of a layer.
func (b *blobs) list(t *testing.T, d digest.Digest) tree {
	t.Helper()
	out := tree{}
	for r := tar.NewReader(bytes.NewReader(b.data[d])); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		sum := digest.SHA256.Digester()
		if _, err := io.Copy(sum.Hash(), r); err != nil {
			t.Fatal(err)
		}
		out[h.Name] += fmt.Sprintf("%c %o %d:%d %d %s %d:%d %v %s;", h.Typeflag, h.Mode, h.Uid, h.Gid, h.ModTime.Unix(), h.Linkname, h.Devmajor, h.Devminor, h.PAXRecords, sum.Digest())
	}
}

func (b *blobs) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	data, ok := b.data[d.Digest]
	if !ok {
		return nil, fmt.Errorf("content %s: %w", d.Digest, errdefs.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func (b *blobs) Create(context.Context, string) (diff.Writer, error) { return &blobWriter{b: b}, nil }

type blobWriter struct {
	bytes.Buffer
	b *blobs
}

func (w *blobWriter) Digest() digest.Digest { return digest.FromBytes(w.Bytes()) }
func (w *blobWriter) Close() error          { return nil }
func (w *blobWriter) Commit(context.Context, int64, digest.Digest, map[string]string) error {
	w.b.add(bytes.Clone(w.Bytes()))
	return nil
}
