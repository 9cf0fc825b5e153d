package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts/stack"
	"github.com/managerd/managerd/shimapi/mount"
)

// backing is the file of a loop device, empty when none is attached.
func backing(device string) string {
	b, _ := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	return strings.TrimSpace(string(b))
}

// detached waits until nobody has a device any more: whoever copies the mount namespace meanwhile has it for a moment.
func detached(t *testing.T, device string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); backing(device) != ""; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("%s is still a device of %s", device, backing(device))
			return
		}
	}
}

const id = "550e8400-e29b-41d4-a716-446655440000"

// disk is a file with a file system that is made, its loop device, the file system, and a directory in it, which is left for
// the client.
func disk(file string, options ...string) []*types.Mount {
	return []*types.Mount{
		{Type: "mkfs/loop", Source: file, Options: append([]string{"X-containerd.mkfs.size=8MiB", "X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.uuid=" + id}, options...)},
		{Type: "format/ext4", Source: "{{ mount 0 }}"},
		{Type: "format/mkdir/bind", Source: "{{ mount 1 }}/d", Options: []string{"X-containerd.mkdir.path={{ mount 1 }}/d:755", "bind"}},
	}
}

// TestDisk: a file with a file system is made once, and is a loop device as long as the activation, also over a restart; the
// client has what it writes when it comes again.
func TestDisk(t *testing.T) {
	s, ctx, dir := fresh(t)
	file := filepath.Join(dir, "disk")
	for round := range 2 {
		a, err := s.Activate(ctx, "x", disk(file), Options{})
		if err != nil {
			t.Fatal(err)
		}
		s = open(t, s.state, s.db)
		device := a.Active[0].Data[DataDevice]
		if link, err := os.Readlink(a.Active[0].Point); err != nil || link != device || backing(device) != file || len(a.Active) != 2 {
			t.Errorf("%+v: %s is of %q, %v", a, link, backing(device), err)
		}
		for _, m := range append(a.System, a.Active[0].Mount, a.Active[1].Mount) {
			if strings.Contains(fmt.Sprint(m.Options, m.Source, m.Type), "containerd") || strings.Contains(m.Type, "/") {
				t.Errorf("not resolved: %v", m)
			}
		}
		if got, err := s.Info(ctx, "x"); err != nil || got.Active[0].Data[DataDevice] != device {
			t.Errorf("%+v, %v", got, err)
		}
		at := t.TempDir()
		if err := mount.Mount(a.System, at); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(at, "f"))
		if round == 0 {
			b, err = []byte("here"), os.WriteFile(filepath.Join(at, "f"), []byte("here"), 0o600)
		}
		if err != nil || string(b) != "here" {
			t.Errorf("%q, %v", b, err)
		}
		if err := errors.Join(mount.Unmount(at), s.Deactivate(ctx, "x")); err != nil {
			t.Fatal(err)
		}
		detached(t, device)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	uuid := make([]byte, 16)
	_, err = f.ReadAt(uuid, 1024+0x68) // s_uuid of ext4's superblock
	if fi, serr := f.Stat(); errors.Join(err, serr) != nil || fi.Size() != 8<<20 || fmt.Sprintf("%x", uuid) != strings.ReplaceAll(id, "-", "") {
		t.Errorf("%x, %v, %v", uuid, fi.Size(), err)
	}
}

// TestLoop: a loop device is as its options say, with sectors of 512 bytes whatever the disk has, and one that a client has
// mounted by itself goes when he unmounts it.
func TestLoop(t *testing.T) {
	s, ctx, dir := fresh(t)
	file := filepath.Join(dir, "disk")
	list := disk(file)[:1]
	if _, err := s.Activate(ctx, "made", list, Options{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Deactivate(ctx, "made"); err != nil {
		t.Fatal(err)
	}
	for options, ro := range map[string]string{"": "0", "ro": "1", "ro,rw": "0"} {
		a, err := s.Activate(ctx, "x", []*types.Mount{{Type: "loop", Source: file, Options: strings.Split(options, ",")}}, Options{})
		if err != nil || len(a.System) != 0 {
			t.Fatalf("%+v, %v", a, err)
		}
		device := a.Active[0].Data[DataDevice]
		for what, want := range map[string]string{"ro": ro, "queue/logical_block_size": "512", "loop/autoclear": "0"} {
			b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), what))
			if got := strings.TrimSpace(string(b)); err != nil || got != want {
				t.Errorf("%q: %s is %s, not %s: %v", options, what, got, want, err)
			}
		}
		at := t.TempDir()
		if err := mount.Mount([]*types.Mount{{Type: "ext4", Source: a.Active[0].Point, Options: []string{"ro"}}}, at); err != nil {
			t.Fatal(err)
		}
		if err := s.Deactivate(ctx, "x"); err != nil {
			t.Fatal(err)
		}
		if backing(device) != file {
			t.Errorf("%q: %s went under its mount", options, device)
		}
		if options == "ro" {
			again := []*types.Mount{{Type: "loop", Source: file}}
			if _, err := s.Activate(ctx, "y", again, Options{}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), device) {
				t.Errorf("a second one to write to: %v", err)
			}
			again[0].Options = []string{"ro"}
			if _, err := s.Activate(ctx, "y", again, Options{}); err != nil {
				t.Error(err)
			}
			if err := s.Deactivate(ctx, "y"); err != nil {
				t.Error(err)
			}
		}
		if err := mount.Unmount(at); err != nil {
			t.Fatal(err)
		}
		detached(t, device)
	}
}

// TestForeignLoop: a link to a device that somebody else has by now does not cost him his.
func TestForeignLoop(t *testing.T) {
	s, ctx, dir := fresh(t)
	mine, his := filepath.Join(dir, "mine"), filepath.Join(dir, "his")
	a, err := s.Activate(ctx, "x", disk(mine)[:1], Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(his, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := mount.Attach(his, mount.Loop{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	devices, err := stack.Devices(s.state)
	if err != nil || len(devices) != 1 || devices[0].Path != a.Active[0].Data[DataDevice] || devices[0].Stack != s.path("one", "x") {
		t.Fatalf("%+v, %v", devices, err)
	}
	if err := errors.Join(devices[0].Detach(), os.Remove(a.Active[0].Point), os.Symlink(f.Name(), a.Active[0].Point), s.Deactivate(ctx, "x")); err != nil {
		t.Fatal(err)
	}
	if backing(f.Name()) != his {
		t.Errorf("%s is a device of %q", f.Name(), backing(f.Name()))
	}
}

// TestFile: what is there is used as it is, at once or by many, and what cannot be made is said, and leaves nothing.
func TestFile(t *testing.T) {
	s, ctx, dir := fresh(t)
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Activate(ctx, "x", disk(there)[:1], Options{}); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(there); err != nil || fi.Size() != 1<<16 {
		t.Errorf("%v, %v", fi, err)
	}
	if err := s.Deactivate(ctx, "x"); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(there, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, link} {
		if _, err := s.Activate(ctx, "x", disk(path), Options{}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), path) {
			t.Errorf("%v", err)
		}
	}

	shared := filepath.Join(dir, "shared")
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			if _, err := s.Activate(ctx, fmt.Sprint(i), disk(shared, "ro")[:1], Options{}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for i := range 4 {
		if err := s.Deactivate(ctx, fmt.Sprint(i)); err != nil {
			t.Error(err)
		}
	}

	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Activate(ended, "x", disk(filepath.Join(dir, "never")), Options{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	t.Setenv("PATH", dir)
	_, err := s.Activate(ctx, "x", disk(filepath.Join(dir, "never")), Options{})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "mkfs.ext4 (e2fsprogs) is not installed") {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*mkfs*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "never")); !os.IsNotExist(err) {
		t.Error(err)
	}
}

// TestEscape: what is mounted cannot lead out of itself what is made below it.
func TestEscape(t *testing.T) {
	s, ctx, dir := fresh(t)
	tree, out := filepath.Join(dir, "tree"), filepath.Join(dir, "out")
	if err := errors.Join(os.Mkdir(tree, 0o755), os.Mkdir(out, 0o755), os.Symlink(out, filepath.Join(tree, "l")), os.Symlink("/etc/passwd", filepath.Join(tree, "p"))); err != nil {
		t.Fatal(err)
	}
	bind := &types.Mount{Type: "bind", Source: tree, Options: []string{"bind"}}
	for _, m := range []*types.Mount{
		{Type: "format/mkdir/bind", Source: "/", Options: []string{"bind", "X-containerd.mkdir.path={{ mount 0 }}/l/d"}},
		{Type: "format/mkdir/bind", Source: "/", Options: []string{"bind", "X-containerd.mkdir.path={{ mount 0 }}/l"}},
		{Type: "format/mkfs/loop", Source: "{{ mount 0 }}/l/f", Options: []string{"X-containerd.mkfs.size=8MiB"}},
		{Type: "format/mkfs/loop", Source: "{{ mount 0 }}/p", Options: []string{"X-containerd.mkfs.size=8MiB"}},
		{Type: "format/loop", Source: "{{ mount 0 }}/p"},
	} {
		if _, err := s.Activate(ctx, "x", []*types.Mount{bind, m}, Options{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "leads out") {
			t.Errorf("%v: %v", m, err)
		}
	}
	if made, err := os.ReadDir(out); err != nil || len(made) > 0 {
		t.Errorf("%v, %v", made, err)
	}
}

// TestBusy: what somebody uses stays active, and can be deactivated when he has done.
func TestBusy(t *testing.T) {
	s, ctx, dir := fresh(t)
	a, err := s.Activate(ctx, "x", disk(filepath.Join(dir, "disk")), Options{})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(a.Active[1].Point, "d"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Deactivate(ctx, "x"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), a.Active[1].Point+" is in use") {
		t.Error(err)
	}
	if got, err := s.Info(ctx, "x"); err != nil || len(got.Active) != 2 || backing(a.Active[0].Data[DataDevice]) == "" {
		t.Errorf("%+v, %v", got, err)
	}
	if err := errors.Join(f.Close(), s.Deactivate(ctx, "x")); err != nil {
		t.Error(err)
	}
}

// TestTemporary: all is mounted, whatever it is, and a bind mount of the last one is left.
func TestTemporary(t *testing.T) {
	s, ctx, dir := fresh(t)
	for _, list := range [][]*types.Mount{disk(filepath.Join(dir, "disk")), {{Type: "tmpfs", Source: "none"}}} {
		a, err := s.Activate(ctx, "x", list, Options{Temporary: true})
		if err != nil {
			t.Fatal(err)
		}
		last := a.Active[len(a.Active)-1].Point
		if len(a.Active) != len(list) || len(a.System) != 1 || a.System[0].Type != "bind" || a.System[0].Source != last {
			t.Errorf("%+v", a)
		}
		var st unix.Statfs_t
		at := t.TempDir()
		if err := errors.Join(mount.Mount(a.System, at), os.WriteFile(filepath.Join(at, "f"), nil, 0o600), unix.Statfs(last, &st), mount.Unmount(at)); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(last, "f")); err != nil {
			t.Error(err)
		}
		if err := s.Deactivate(ctx, "x"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLeased: a lease keeps what is made under it, and lets go of what is deactivated, or could not be made.
func TestLeased(t *testing.T) {
	s, ctx, dir := fresh(t)
	held := func() string {
		t.Helper()
		all, err := leases.NewStore(s.db).ListResources(ctx, "l")
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(all)
	}
	under := leases.With(ctx, "l")
	if _, err := s.Activate(under, "x", disk(filepath.Join(dir, "disk")), Options{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"l"`) {
		t.Errorf("an unknown lease: %v", err)
	}
	if _, err := leases.NewStore(s.db).Create(ctx, "l", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Activate(under, "x", []*types.Mount{{Type: "loop", Source: "/nosuch"}}, Options{}); err == nil || held() != "[]" {
		t.Errorf("%s, %v", held(), err)
	}
	if _, err := s.Activate(under, "x", disk(filepath.Join(dir, "disk")), Options{}); err != nil || held() != "[{x mounts}]" {
		t.Errorf("%s, %v", held(), err)
	}
	s = open(t, s.state, s.db)
	if err := s.Deactivate(ctx, "x"); err != nil || held() != "[]" {
		t.Errorf("%s, %v", held(), err)
	}
	// One that the client had it keep before stays.
	if err := leases.NewStore(s.db).AddResource(ctx, "l", leases.Resource{Type: leases.Mounts, ID: "x"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Activate(under, "x", []*types.Mount{{Type: "loop", Source: "/nosuch"}}, Options{}); err == nil || held() != "[{x mounts}]" {
		t.Errorf("%s, %v", held(), err)
	}
}

// TestClaim: what is to be collected is not, once it has changed or somebody works on it.
func TestClaim(t *testing.T) {
	s, ctx, dir := fresh(t)
	seen, err := s.Activate(ctx, "x", disk(filepath.Join(dir, "disk")), Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := s.Claim("one", seen)
	if c == nil || s.Claim("one", seen) != nil {
		t.Fatal("it is not claimed by one")
	}
	hurry, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.Deactivate(hurry, "x"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if all, err := s.List(ctx, filters.Always); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
	c.Release()
	now, err := s.Update(ctx, "x", map[string]string{"k": "v"})
	if err != nil {
		t.Fatal(err)
	}
	if s.Claim("one", seen) != nil || s.Claim("other", now) != nil {
		t.Error("it is claimed as it was")
	}
	if c = s.Claim("one", now); c == nil {
		t.Fatal("it is not claimed")
	}
	if err := c.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := s.Info(ctx, "x"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// TestExpiryTold: the collector is told when an activation ends.
func TestExpiryTold(t *testing.T) {
	s, ctx, dir := fresh(t)
	var told []metadata.Change
	defer s.db.Watch(func(c []metadata.Change) { told = append(told, c...) })()
	if _, err := s.Activate(ctx, "x", disk(filepath.Join(dir, "disk")), Options{Labels: map[string]string{leases.ExpireLabel: "2100-01-01T00:00:00Z"}}); err != nil {
		t.Fatal(err)
	}
	if len(told) != 1 || told[0].Kind != metadata.Mounts || told[0].Key != "x" || told[0].Namespace != "one" || told[0].Expires.Year() != 2100 {
		t.Errorf("%+v", told)
	}
	if err := s.Deactivate(ctx, "x"); err != nil {
		t.Error(err)
	}
}

// TestFileSystems: every file system that can be named is made, and is what it is called.
func TestFileSystems(t *testing.T) {
	for fstype, c := range map[string]struct {
		size  string
		magic int64
	}{"ext2": {"4MiB", unix.EXT2_SUPER_MAGIC}, "ext3": {"8m", unix.EXT3_SUPER_MAGIC}, "xfs": {"0.3g", unix.XFS_SUPER_MAGIC}} {
		t.Run(fstype, func(t *testing.T) {
			if _, err := exec.LookPath("mkfs." + fstype); err != nil {
				t.Skipf("mkfs.%s is not installed", fstype)
			}
			s, ctx, dir := fresh(t)
			a, err := s.Activate(ctx, "x", []*types.Mount{
				{Type: "mkfs/" + fstype, Source: filepath.Join(dir, "disk"), Options: []string{"loop", "X-containerd.mkfs.fs=" + fstype, "X-containerd.mkfs.size=" + c.size, "X-containerd.mkfs.uuid=" + id}},
			}, Options{Temporary: true})
			if err != nil {
				t.Fatal(err)
			}
			var st unix.Statfs_t
			if err := unix.Statfs(a.Active[0].Point, &st); err != nil || int64(st.Type) != c.magic {
				t.Errorf("%x, %v", st.Type, err)
			}
			if err := s.Deactivate(ctx, "x"); err != nil {
				t.Error(err)
			}
		})
	}
}
