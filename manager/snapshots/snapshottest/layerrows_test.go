package snapshottest_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// when is the time of everything in these layers that says no other one; later is that of what is changed by hand.
var when, later = time.Unix(1_700_000_000, 0), time.Unix(1_800_000_000, 0)

// entry is one of a layer's tar. What its header lacks is filled in: a name that ends with a slash is a directory.
type entry struct {
	tar.Header
	body string
	hole int64 // bytes of a hole before the body

	noMode bool // the mode 0 is meant
}

// write adds it to the archive w, which writes to b.
func (e entry) write(b *bytes.Buffer, w *tar.Writer) error {
	h := e.Header
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag = tar.TypeDir
		}
	}
	if h.Mode == 0 && !e.noMode {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	if h.ModTime.IsZero() {
		h.ModTime = when
	}
	if h.Format, h.Size = tar.FormatPAX, int64(len(e.body)); e.hole > 0 {
		return e.sparse(b, w)
	}
	if err := w.WriteHeader(&h); err != nil {
		return err
	}
	_, err := io.WriteString(w, e.body)
	return err
}

// sparse writes it as GNU tar does, in its PAX format 1.0: the content is a map of the data, and the data.
func (e entry) sparse(b *bytes.Buffer, w *tar.Writer) error {
	size := e.hole + int64(len(e.body))
	body := make([]byte, 512)
	copy(body, fmt.Sprintf("1\n%d\n%d\n", e.hole, len(e.body)))
	body = append(body, e.body...)
	pax := ""
	for _, kv := range [][2]string{{"major", "1"}, {"minor", "0"}, {"name", e.Name}, {"realsize", fmt.Sprint(size)}} {
		rest := fmt.Sprintf(" GNU.sparse.%s=%s\n", kv[0], kv[1])
		n := len(rest) + 1
		for len(fmt.Sprint(n))+len(rest) != n {
			n++
		}
		pax += fmt.Sprint(n) + rest
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, part := range []struct {
		flag byte
		data []byte
	}{{tar.TypeXHeader, []byte(pax)}, {tar.TypeReg, body}} {
		h := make([]byte, 512)
		copy(h, "GNUSparseFile/file")
		copy(h[100:], "0000644\x000000000\x000000000\x00"+fmt.Sprintf("%011o\x00%011o\x00", len(part.data), when.Unix())+"        ")
		h[156] = part.flag
		copy(h[257:], "ustar\x0000")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		b.Write(h)
		b.Write(part.data)
		b.Write(make([]byte, (512-len(part.data)%512)%512))
	}
	return nil
}

func file(name string) entry {
	return entry{Header: tar.Header{Name: name}, body: "body of " + filepath.Base(name)}
}
func dir(name string) entry { return entry{Header: tar.Header{Name: name + "/"}} }
func gone(name string) entry {
	d, base := filepath.Split(name)
	return entry{Header: tar.Header{Name: d + ".wh." + base}}
}
func opaque(name string) entry { return entry{Header: tar.Header{Name: name + "/.wh..wh..opq"}} }
func symlink(name, target string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}}
}
func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}}
}
func node(name string, kind byte, major, minor int64) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: kind, Devmajor: major, Devminor: minor}}
}

// with changes a header.
func (e entry) with(change func(h *tar.Header)) entry {
	change(&e.Header)
	return e
}

func (e entry) xattrs(pairs ...string) entry {
	e.PAXRecords = map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		e.PAXRecords["SCHILY.xattr."+pairs[i]] = pairs[i+1]
	}
	return e
}

func (e entry) owner(uid, gid int) entry {
	return e.with(func(h *tar.Header) { h.Uid, h.Gid = uid, gid })
}
func (e entry) mode(m int64) entry   { return e.with(func(h *tar.Header) { h.Mode = m }) }
func (e entry) at(t time.Time) entry { return e.with(func(h *tar.Header) { h.ModTime = t }) }

const large = 4 << 20 // bytes

// capability is cap_net_raw+ep, as the kernel keeps it (struct vfs_cap_data).
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

var (
	long    = strings.Repeat("l", 100)
	deep    = strings.Repeat(long+"/", 4) + long // 504 bytes
	longest = strings.Repeat("n", 254)           // mkfs.erofs 1.5 takes none of 255
	nanos   = time.Unix(1_700_000_001, 123_456_789)
)

// tree is what each name in it is, see look.
type tree map[string]string

// row is a feature of layers. Names are relative to a directory of the row's own. want is the tree that parent and layer
// make.
type row struct {
	name   string
	parent []entry
	layer  []entry
	want   tree
	// check, if not nil, looks at the row's directory once the layer is applied.
	check func(t *testing.T, root string)
	// edit changes the applied tree by hand; what Diff makes of that must do the same elsewhere.
	edit func(root string) error
}

var rows = []row{
	{name: "whiteout of a file", parent: []entry{dir("d"), file("d/f"), file("d/g"), file("top")}, layer: []entry{gone("d/f"), gone("top")},
		want: tree{"d": "dir", "d/g": "body of g"}, edit: remove("d/g")},
	{name: "whiteout of a directory", parent: []entry{dir("d"), dir("d/in"), file("d/in/f"), symlink("l", "d")}, layer: []entry{gone("d"), gone("l")},
		want: tree{}},
	{name: "whiteout of nothing", parent: []entry{file("f")}, layer: []entry{gone("no"), gone("no/such"), gone("f/x")}, want: tree{"f": "body of f"}},
	{name: "whiteout of what the layer has", parent: []entry{dir("d"), file("d/old")}, layer: []entry{dir("d"), file("d/f"), gone("d/f"), gone("d")},
		want: tree{"d": "dir", "d/f": "body of f"}},
	{name: "opaque, said first", parent: []entry{dir("d"), file("d/f"), dir("d/in"), file("d/in/f")},
		layer: []entry{dir("d"), opaque("d"), file("d/new"), dir("d/in"), file("d/in/new")},
		want:  tree{"d": "dir", "d/in": "dir", "d/in/new": "body of new", "d/new": "body of new"}},
	{name: "opaque, said last", parent: []entry{dir("d"), file("d/f"), dir("d/in"), file("d/in/f")},
		layer: []entry{dir("d"), file("d/new"), dir("d/in"), file("d/in/new"), opaque("d")},
		want:  tree{"d": "dir", "d/in": "dir", "d/in/new": "body of new", "d/new": "body of new"},
		edit: func(root string) error { // made anew by hand
			return errors.Join(os.RemoveAll(root+"/d"), os.Mkdir(root+"/d", 0o700), os.WriteFile(root+"/d/own", nil, 0o600))
		}},
	{name: "file for a directory", parent: []entry{dir("d"), file("d/f"), dir("e"), file("e/f")}, layer: []entry{file("d"), symlink("e", "d")},
		want: tree{"d": "body of d", "e": "-> d"}, edit: func(root string) error {
			return errors.Join(os.Remove(root+"/d"), os.Mkdir(root+"/d", 0o755), os.WriteFile(root+"/d/f", []byte("1"), 0o644))
		}},
	{name: "directory for a file", parent: []entry{file("f"), symlink("l", "f"), node("p", tar.TypeFifo, 0, 0)},
		layer: []entry{dir("f"), file("f/g"), dir("l"), file("l/g"), dir("p")},
		want:  tree{"f": "dir", "f/g": "body of g", "l": "dir", "l/g": "body of g", "p": "dir"}, edit: func(root string) error {
			return errors.Join(os.RemoveAll(root+"/f"), os.WriteFile(root+"/f", []byte("1"), 0o644))
		}},
	{name: "hard links", layer: []entry{dir("a"), dir("b"), file("a/f"), hardlink("a/g", "$/a/f"), hardlink("b/f", "$/a/f"), symlink("a/s", "f"), hardlink("b/s", "$/a/s")},
		want: tree{"a": "dir", "a/f": "body of f", "a/g": "is a/f", "a/s": "-> f", "b": "dir", "b/f": "is a/f", "b/s": "is a/s"}, edit: func(root string) error {
			return os.Remove(root + "/a/f")
		}},
	{name: "hard link to a file below", parent: []entry{dir("d"), file("d/m"), file("d/n"), file("d/o")}, layer: []entry{hardlink("z", "$/d/m"), dir("e"), hardlink("e/n", "$/d/n")},
		want: tree{"d": "dir", "d/m": "body of m", "d/n": "body of n", "d/o": "body of o", "e": "dir", "e/n": "is d/n", "z": "is d/m"}, edit: func(root string) error {
			return os.Link(root+"/d/o", root+"/d/a")
		}},
	{name: "file for a hard link", parent: []entry{file("a"), hardlink("b", "$/a")}, layer: []entry{entry{Header: tar.Header{Name: "b"}, body: "new"}},
		want: tree{"a": "body of a", "b": "new"}},
	{name: "extended attributes", parent: []entry{dir("d"), file("e").xattrs("user.old", "1")},
		layer: []entry{file("cap").xattrs("security.capability", capability).mode(0o755), dir("d").xattrs("user.d", "\x00\xff"),
			file("e").xattrs("user.new", "2", "user.empty", ""), file("f").xattrs("trusted.overlay.opaque", "y", "user.overlay.redirect", "/etc")},
		want: tree{"cap": fmt.Sprintf("body of cap mode=755 security.capability=%q", capability), `d`: `dir user.d="\x00\xff"`, `e`: `body of e user.empty="" user.new="2"`, "f": "body of f"},
		edit: func(root string) error {
			return errors.Join(unix.Lsetxattr(root+"/d", "user.more", []byte("1"), 0), unix.Lremovexattr(root+"/e", "user.new"))
		}},
	{name: "sparse file", parent: []entry{}, layer: []entry{{Header: tar.Header{Name: "s"}, body: "end", hole: large}},
		want: tree{"s": "4194307 bytes " + digest.FromString(strings.Repeat("\x00", large)+"end").String()}, check: func(t *testing.T, root string) {
			var st unix.Stat_t
			if err := unix.Stat(root+"/s", &st); err != nil || st.Blocks*512 > large/4 {
				t.Errorf("it takes %d bytes of the disk (%v)", st.Blocks*512, err)
			}
		}},
	{name: "devices and fifos", parent: []entry{node("c", tar.TypeChar, 1, 3), file("b"), node("x", tar.TypeFifo, 0, 0)},
		layer: []entry{node("c", tar.TypeChar, 1, 5), node("b", tar.TypeBlock, 7, 99).mode(0o660).owner(0, 6), node("p", tar.TypeFifo, 0, 0).mode(0o622),
			node("big", tar.TypeChar, 511, 1_000_000), gone("x")},
		want: tree{"b": "block 7:99 mode=660 owner=0:6", "big": "char 511:1000000", "c": "char 1:5", "p": "fifo mode=622"},
		edit: func(root string) error {
			return errors.Join(unix.Mknod(root+"/new", unix.S_IFIFO|0o600, 0), os.Remove(root+"/big"))
		}},
	{name: "long names", parent: []entry{file(deep + "/old")},
		layer: []entry{file(deep + "/f"), symlink(deep+"/l", deep+"/f"), hardlink(deep+"/h", "$/"+deep+"/f"), file(longest), gone(deep + "/old")},
		want:  tree{long: "dir", long + "/" + long: "dir", strings.Repeat(long+"/", 2) + long: "dir", strings.Repeat(long+"/", 3) + long: "dir", deep: "dir", deep + "/f": "body of f", deep + "/h": "is " + deep + "/f", deep + "/l": "-> " + deep + "/f", longest: "body of " + longest},
		edit:  remove(longest)},
	{name: "odd names", layer: []entry{file("\xff\xfe"), file("new\nline"), file(" blanks "), file("é"), file("e\u0301"), symlink("l\x80", "\xff\xfe"), file("a=b"), file("\\"), file(".wh")},
		parent: []entry{file("\xc3"), file("\x01")}, want: tree{"\x01": "body of \x01", " blanks ": "body of  blanks ", ".wh": "body of .wh", "\\": "body of \\", "a=b": "body of a=b", "e\u0301": "body of e\u0301", "l\x80": "-> \xff\xfe", "new\nline": "body of new\nline", "é": "body of é", "\xc3": "body of \xc3", "\xff\xfe": "body of \xff\xfe"},
		edit: remove("\xc3")},
	{name: "large owners", layer: []entry{file("f").owner(3_000_000, 2_097_152), dir("d").owner(4_294_967_294, 1), symlink("l", "f").owner(70_000, 70_001)},
		want: tree{"d": "dir owner=4294967294:1", "f": "body of f owner=3000000:2097152", "l": "-> f owner=70000:70001"},
		edit: func(root string) error { return os.Lchown(root+"/l", 3_000_001, 0) }},
	{name: "modes", parent: []entry{dir("t"), file("u")}, layer: []entry{file("u").mode(0o4755).owner(7, 8), file("g").mode(0o2755).owner(7, 8), dir("t").mode(0o1777), dir("sg").mode(0o2775), entry{Header: tar.Header{Name: "none"}, body: "body of none", noMode: true}},
		want: tree{"g": "body of g mode=2755 owner=7:8", "none": "body of none mode=0", "sg": "dir mode=2775", "t": "dir mode=1777", "u": "body of u mode=4755 owner=7:8"},
		edit: func(root string) error {
			return errors.Join(unix.Chmod(root+"/u", 0o711), unix.Chmod(root+"/sg", 0o6750))
		}},
	{name: "times", layer: []entry{file("f").at(nanos), dir("d").at(nanos), symlink("l", "f").at(nanos), file("old").at(time.Unix(-1000, 0)), file("new").at(time.Unix(1<<32, 0))},
		want: tree{"d": "dir time=" + stamp(nanos), "f": "body of f time=" + stamp(nanos), "l": "-> f time=" + stamp(nanos), "new": "body of new time=4294967296.000000000", "old": "body of old time=-1000.000000000"}},
	{name: "times of directories", parent: []entry{dir("below"), file("below/f"), dir("less"), file("less/f"), dir("in"), dir("in/in"), file("in/in/f")},
		layer: []entry{file("below/new"), gone("less/f"), dir("own").at(nanos), file("own/f"), dir("own/d"), file("made/by/name").at(nanos), file("in/in/g"), opaque("in")},
		want:  tree{"below": "dir", "below/f": "body of f", "below/new": "body of new", "in": "dir", "in/in": "dir", "in/in/g": "body of g", "less": "dir", "made": "dir time=" + stamp(nanos), "made/by": "dir time=" + stamp(nanos), "made/by/name": "body of name time=" + stamp(nanos), "own": "dir time=" + stamp(nanos), "own/d": "dir", "own/f": "body of f"},
		edit:  remove("own/f")},
	{name: "symbolic links below", parent: []entry{dir("real"), symlink("rel", "real"), symlink("abs", "/$/real"), symlink("up", "../../../../$/real"), symlink("dangling", "made")},
		layer: []entry{file("rel/f"), file("abs/g"), file("up/h"), file("dangling/i")},
		want:  tree{"abs": "-> /$/real", "dangling": "-> made", "made": "dir", "made/i": "body of i", "real": "dir", "real/f": "body of f", "real/g": "body of g", "real/h": "body of h", "rel": "-> real", "up": "-> ../../../../$/real"},
		edit: func(root string) error {
			return errors.Join(os.Remove(root+"/rel"), os.Symlink("nowhere", root+"/rel"))
		}},
	{name: "a content that its time hides", parent: []entry{{Header: tar.Header{Name: "f"}, body: "one"}}, layer: []entry{file("g")},
		want: tree{"f": "one", "g": "body of g"}, edit: func(root string) error {
			return errors.Join(os.WriteFile(root+"/f", []byte("two"), 0o644), os.Chtimes(root+"/f", when, when))
		}},
	{name: "renames", parent: []entry{dir("a"), file("a/f"), dir("a/in"), file("a/in/g")}, layer: []entry{dir("b"), file("b/f")},
		want: tree{"a": "dir", "a/f": "body of f", "a/in": "dir", "a/in/g": "body of g", "b": "dir", "b/f": "body of f"}, edit: func(root string) error {
			return errors.Join(os.CopyFS(root+"/c", os.DirFS(root+"/a")), os.RemoveAll(root+"/a"), os.CopyFS(root+"/a", os.DirFS(root+"/b")), os.RemoveAll(root+"/b"),
				os.Rename(root+"/a/f", root+"/c/g"))
		}},
	{name: "a socket for a file", parent: []entry{file("f"), file("g")}, layer: []entry{file("h")}, want: tree{"f": "body of f", "g": "body of g", "h": "body of h"},
		edit: func(root string) error {
			return errors.Join(os.Remove(root+"/f"), unix.Mknod(root+"/f", unix.S_IFSOCK|0o600, 0))
		}},
}

// dir is where a row is.
func (r row) dir() string { return strings.NewReplacer(" ", "-", ",", "").Replace(r.name) }

func stamp(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }

func remove(name string) func(string) error {
	return func(root string) error { return os.RemoveAll(filepath.Join(root, name)) }
}
