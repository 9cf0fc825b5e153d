package spec

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const testPasswd = `# users
root:x:0:0:root:/root:/bin/sh
web:x:1000:1001:the web,,,:/srv:/bin/sh
1000:x:0:0:digits for a name:/:/bin/sh
broken:x:abc:0::/:/bin/sh
nogroup:x:1005::::
huge:x:4294967296:0::/:/bin/sh
short:x
+::::::
`

const testGroup = `root:x:0:
web:x:1001:
log:x:1002:someone,web
disk:x:1003:web
bad:x:zzz:web
webby:x:1004:website
damaged:x:-1:
`

func TestUser(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{"etc/passwd": testPasswd, "etc/group": testGroup})
	empty := t.TempDir()
	gids := func(g ...uint32) []uint32 { return g }
	for _, c := range []struct {
		user, rootfs string
		want         specs.User
	}{
		{"", dir, specs.User{}},
		{"root", dir, specs.User{AdditionalGids: gids(0)}},
		{"0", "", specs.User{AdditionalGids: gids(0)}},
		{"web", dir, specs.User{UID: 1000, GID: 1001, AdditionalGids: gids(1001, 1002, 1003)}},
		{"1000", dir, specs.User{UID: 1000, GID: 1001, AdditionalGids: gids(1001, 1002, 1003)}},
		{"1000", "", specs.User{UID: 1000, AdditionalGids: gids(0)}},
		{"1000", empty, specs.User{UID: 1000, AdditionalGids: gids(0)}},
		{"77", dir, specs.User{UID: 77, AdditionalGids: gids(0)}},
		{"77:88", "", specs.User{UID: 77, GID: 88, AdditionalGids: gids(88)}},
		{"77:88", "/nonexistent", specs.User{UID: 77, GID: 88, AdditionalGids: gids(88)}},
		{"web:disk", dir, specs.User{UID: 1000, GID: 1003, AdditionalGids: gids(1003)}},
		{"web:5", dir, specs.User{UID: 1000, GID: 5, AdditionalGids: gids(5)}},
		{"77:log", dir, specs.User{UID: 77, GID: 1002, AdditionalGids: gids(1002)}},
		{"2147483647", "", specs.User{UID: 1<<31 - 1, AdditionalGids: gids(0)}},
	} {
		if got := apply(t, User(c.user, c.rootfs)).Process.User; !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q in %q: %+v, want %+v", c.user, c.rootfs, got, c.want)
		}
	}
	invalid, missing := errdefs.IsInvalidArgument, errdefs.IsNotFound
	for _, c := range []struct {
		user, rootfs string
		is           func(error) bool
		text         string
	}{
		{"bob", dir, missing, `no user "bob"`},
		{"bob", empty, missing, "no /etc/passwd"},
		{"bob", "", invalid, "no root file system"},
		{"bob", "/nonexistent", missing, "/nonexistent"},
		{"bob", "/etc/passwd", invalid, "/etc/passwd"},
		{"web:bobs", dir, missing, `no group "bobs"`},
		{"0:bobs", "", invalid, `"bobs"`},
		{"0:bobs", empty, missing, `"bobs"`},
		{"broken", dir, invalid, `"abc"`},
		{"nogroup", dir, invalid, `""`},
		{"huge", dir, invalid, `"4294967296"`},
		{"short", dir, missing, `"short"`},
		{"web:bad", dir, invalid, `"zzz"`},
		{"web:damaged", dir, invalid, `"-1"`},
		{"4294967296", dir, invalid, "4294967296"},
		{"2147483648", "", invalid, "2147483648"},
		{"0:99999999999999999999", "", invalid, "99999999999999999999"},
		{"-1", "", invalid, `"-1"`},
		{":0", dir, invalid, "expected"},
		{"web:", dir, invalid, "expected"},
		{"a:b:c", dir, invalid, "expected"},
		{"a\nb", dir, invalid, "expected"},
	} {
		_, err := New("id", "ns", User(c.user, c.rootfs))
		if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%q in %q: error %v", c.user, c.rootfs, err)
		}
	}
}

// TestImageUser: what an image says goes the same way, at the latest when New is done.
func TestImageUser(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{"etc/passwd": testPasswd, "etc/group": testGroup})
	image := Image(&ocispec.ImageConfig{Cmd: []string{"a"}, User: "web"}, nil)
	want := specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{1001, 1002, 1003}}
	for name, opts := range map[string][]Option{
		"by User":            {image, User("", dir)},
		"by New":             {image, Rootfs(dir)},
		"by User and Rootfs": {Rootfs(dir), image, User("", "")},
	} {
		if got := apply(t, opts...).Process.User; !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	// A user of an option before it does not outlive the image's.
	if got := apply(t, User("7:8", ""), image, User("", dir)).Process.User; !reflect.DeepEqual(got, want) {
		t.Errorf("after an earlier user: %+v", got)
	}
}

// TestUserLinks: links in a root file system mean what they mean inside, and never lead out.
func TestUserLinks(t *testing.T) {
	outside := t.TempDir()
	writeFiles(t, outside, map[string]string{"passwd": "web:x:666:666::/:\n"})
	for _, c := range []struct {
		name  string
		make  func(dir string) error
		found bool
	}{
		{"absolute", func(dir string) error { return os.Symlink("/real/passwd", filepath.Join(dir, "etc/passwd")) }, true},
		{"relative", func(dir string) error { return os.Symlink("../real/passwd", filepath.Join(dir, "etc/passwd")) }, true},
		{"above the root", func(dir string) error { return os.Symlink("../../../../real/passwd", filepath.Join(dir, "etc/passwd")) }, true},
		{"directory", func(dir string) error {
			if err := os.Remove(filepath.Join(dir, "etc")); err != nil {
				return err
			}
			return os.Symlink("/./real/", filepath.Join(dir, "etc"))
		}, true},
		{"out", func(dir string) error {
			return os.Symlink(filepath.Join(outside, "passwd"), filepath.Join(dir, "etc/passwd"))
		}, false},
		{"out by ..", func(dir string) error {
			return os.Symlink("../../"+filepath.Base(outside)+"/passwd", filepath.Join(dir, "etc/passwd"))
		}, false},
		{"loop", func(dir string) error { return os.Symlink("passwd", filepath.Join(dir, "etc/passwd")) }, false},
		{"fifo", func(dir string) error { return syscall.Mkfifo(filepath.Join(dir, "etc/passwd"), 0o644) }, false},
		{"device", func(dir string) error {
			return syscall.Mknod(filepath.Join(dir, "etc/passwd"), syscall.S_IFCHR|0o644, 1<<8|5)
		}, false},
		{"a directory", func(dir string) error { return os.Mkdir(filepath.Join(dir, "etc/passwd"), 0o755) }, false},
		{"huge", func(dir string) error {
			file := filepath.Join(dir, "etc/passwd")
			if err := os.WriteFile(file, nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(file, 1<<40)
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			writeFiles(t, dir, map[string]string{"real/passwd": "web:x:42:43::/:\n"})
			if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := c.make(dir); err != nil {
				t.Fatal(err)
			}
			s, err := New("id", "ns", User("web", dir))
			if !c.found {
				if !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if s.Process.User.UID != 42 || s.Process.User.GID != 43 {
				t.Errorf("user %+v", s.Process.User)
			}
		})
	}
}

// FuzzUser: whatever stands in the files, a name that is not root's does not become root by damage.
func FuzzUser(f *testing.F) {
	f.Add("web", testPasswd, testGroup)
	f.Add("web:log", testPasswd, testGroup)
	f.Add("1000:disk", testPasswd, testGroup)
	f.Add("broken", testPasswd, testGroup)
	f.Add("0", "", "")
	f.Add(":", "::::", ":::")
	f.Fuzz(func(t *testing.T, user, passwd, group string) {
		dir := t.TempDir()
		writeFiles(t, dir, map[string]string{"etc/passwd": passwd, "etc/group": group})
		u, err := lookup(user, dir)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
				t.Errorf("error %v", err)
			}
			return
		}
		if u.UID > maxID || u.GID > maxID || len(u.AdditionalGids) == 0 || u.AdditionalGids[0] != u.GID || u.Username != "" {
			t.Errorf("user %+v", u)
		}
		// Root is who is named so by a zero, in the option or in the user's own line.
		who, _, _ := strings.Cut(user, ":")
		if u.UID == 0 && strings.Trim(who, "0") != "" && !strings.Contains(passwd, ":0") {
			t.Errorf("%q became root: %q", user, passwd)
		}
	})
}
