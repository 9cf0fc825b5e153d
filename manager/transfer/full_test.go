package transfer

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/content"
)

// TestPullDiskFull: a disk on which a layer, or what is in it, has no room fails the pull, gets its room back, and the same
// pull goes well when there is some.
func TestPullDiskFull(t *testing.T) {
	for _, c := range []struct {
		name string
		what string // of the store that has a disk of its own
		wide string // the size of that disk when all fits
	}{{"content", content.Dir, "size=64m"}, {"snapshots", "native", "size=64m"}} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			disk := filepath.Join(dir, c.what)
			if err := unix.Mkdir(disk, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(disk, 0); err != nil {
					t.Error(err)
				}
			})
			used := func() uint64 {
				var fs unix.Statfs_t
				if err := unix.Statfs(disk, &fs); err != nil {
					t.Fatal(err)
				}
				return (fs.Blocks - fs.Bfree) * uint64(fs.Bsize)
			}
			e := newEnvIn(t, content.Shared, dir)
			e.reg.image("a:1", platforms.DefaultSpec(), 110, 10_000, 3_000_000)
			_, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()})
			if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "no space left on device") {
				t.Fatalf("%v", err)
			}
			if n := used(); n > 200_000 {
				t.Errorf("%d bytes are still in use", n)
			}
			if err := unix.Mount("", disk, "", unix.MS_REMOUNT, c.wide); err != nil {
				t.Fatal(err)
			}
			if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
				t.Error(err)
			}
			e.clean(0)
		})
	}
}
