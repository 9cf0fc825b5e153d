package overlayfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/shimapi/mount"
)

func TestJoin(t *testing.T) {
	all, isVolatile := join([]string{"index=off", "metacopy=off"}, []string{"volatile", "metacopy=on", "xino=off"})
	if strings.Join(all, " ") != "index=off metacopy=on xino=off" || !isVolatile {
		t.Error(all, isVolatile)
	}
}

func make1(t *testing.T, o Options) *Backend {
	t.Helper()
	b, err := New(t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// base stores one layer with a file f.
func base(t *testing.T, b *Backend) []snapshots.Ref {
	t.Helper()
	s := snapshots.Snapshot{Ref: snapshots.Ref{ID: 1}, Kind: snapshots.Active}
	if err := b.Create(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.fs(1), "f"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return []snapshots.Ref{s.Ref}
}

func TestBadOptions(t *testing.T) {
	for _, bad := range []string{"", "upperdir=/x", "lowerdir=/x", "workdir=/x", "uidmap=0:0:1", "ro", "no-such-option-of-overlayfs"} {
		if _, err := New(t.TempDir(), Options{Mount: []string{bad}}); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "mount_options") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestOptions(t *testing.T) {
	b := make1(t, Options{Mount: []string{"xino=off"}, UpperdirLabel: true, SyncRemove: true, SlowChown: true})
	m, err := b.Mounts(context.Background(), snapshots.Snapshot{Ref: snapshots.Ref{ID: 2}, Kind: snapshots.View, Parents: []snapshots.Ref{{ID: 1}, {ID: 3}}})
	if err != nil || !slices.Contains(m[0].Options, "xino=off") {
		t.Error(m, err)
	}
	if got := b.Labels(7)[LabelUpper]; got != b.fs(7) {
		t.Errorf("label: %q", got)
	}
	if b.Defers() || slices.Contains(b.Capabilities(), capOnlyRemap) {
		t.Error(b.Defers(), b.Capabilities())
	}
	b = make1(t, Options{})
	if b.Labels(7) != nil || !b.Defers() || !slices.Contains(b.Capabilities(), capOnlyRemap) {
		t.Error(b.Labels(7), b.Defers(), b.Capabilities())
	}
}

// TestVolatile: a layer can be mounted again in the boot in which it was written, and never after that; what is written
// through a mount of ours is synced.
func TestVolatile(t *testing.T) {
	b := make1(t, Options{Mount: []string{volatile}})
	s := snapshots.Snapshot{Ref: snapshots.Ref{ID: 2}, Kind: snapshots.Active, Parents: base(t, b)}
	if err := b.Create(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	for range 2 {
		m, err := b.Mounts(context.Background(), s)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(m[0].Options, volatile) {
			t.Fatalf("mounts: %v", m)
		}
		if err := mount.Mount(m, target); err != nil {
			t.Fatal(err)
		}
		if err := mount.Unmount(target); err != nil {
			t.Fatal(err)
		}
	}
	for _, parents := range [][]snapshots.Ref{nil, s.Parents} { // a bind, and a view
		m, err := b.Mounts(context.Background(), snapshots.Snapshot{Ref: snapshots.Ref{ID: 3}, Kind: snapshots.View, Parents: parents})
		if err != nil || slices.Contains(m[0].Options, volatile) {
			t.Errorf("%v, %v", m, err)
		}
	}

	b.boot = filepath.Join(t.TempDir(), "boot_id")
	if err := os.WriteFile(b.boot, []byte("another\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Mounts(context.Background(), s); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "volatile") {
		t.Errorf("after a boot: %v", err)
	}
	b.volatile = false // also when it is not asked for any more
	if _, err := b.Mounts(context.Background(), s); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("after a boot, without the option: %v", err)
	}
}

func TestRemap(t *testing.T) {
	b := make1(t, Options{})
	if !b.remaps {
		t.Skip("this kernel's overlayfs takes no layers with mapped IDs (Linux 5.19)")
	}
	if !slices.Contains(b.Capabilities(), capRemap) {
		t.Error(b.Capabilities())
	}
	parents := base(t, b)
	labels := map[string]string{LabelUIDMapping: "0:100000:65536", LabelGIDMapping: "0:200000:65536"}
	owner := func(path string) (uint32, uint32) {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Uid, st.Gid
	}
	for name, s := range map[string]snapshots.Snapshot{
		"overlay": {Ref: snapshots.Ref{ID: 2}, Kind: snapshots.Active, Parents: parents, Labels: labels},
		"bind":    {Ref: snapshots.Ref{ID: 3}, Kind: snapshots.Active, Labels: labels},
		"view":    {Ref: snapshots.Ref{ID: 4}, Kind: snapshots.View, Parents: parents, Labels: labels},
	} {
		if err := b.Create(context.Background(), s); err != nil {
			t.Fatal(name, err)
		}
		m, err := b.Mounts(context.Background(), s)
		if err != nil {
			t.Fatal(name, err)
		}
		err = mount.WithTemp(m, func(root string) error {
			if uid, gid := owner(root + "/"); uid != 100000 || gid != 200000 {
				t.Errorf("%s: the root belongs to %d:%d", name, uid, gid)
			}
			if len(s.Parents) > 0 {
				if uid, gid := owner(root + "/f"); uid != 100000 || gid != 200000 {
					t.Errorf("%s: a file belongs to %d:%d", name, uid, gid)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(name, err)
		}
	}
	if uid, gid := owner(b.fs(1)); uid != 0 || gid != 0 {
		t.Errorf("the layer itself belongs to %d:%d", uid, gid)
	}
	for _, bad := range []map[string]string{{LabelUIDMapping: "0:1:1"}, {LabelUIDMapping: "0:x:1", LabelGIDMapping: "0:1:1"}} {
		s := snapshots.Snapshot{Ref: snapshots.Ref{ID: 9}, Kind: snapshots.Active, Parents: parents, Labels: bad}
		if err := b.Create(context.Background(), s); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
