package transfer

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
)

// TestPullBomb: a layer that becomes too much fails the pull and leaves no snapshot and no image.
func TestPullBomb(t *testing.T) {
	e := newEnv(t, content.Shared)
	e.reg.image("a:1", platforms.DefaultSpec(), 1, 200_000)
	e.cfg.Apply.Limits = diff.Limits{Bytes: 100_000}
	if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); !errdefs.IsResourceExhausted(err) {
		t.Error(err)
	}
	if _, err := e.cfg.Images.Get(e.ctx, e.name("a:1")); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	s, err := e.cfg.Snapshots.Snapshotter(native.Name)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Walk(e.ctx, filters.Always, func(i snapshots.Info) error {
		t.Errorf("snapshot %s is left", i.Name)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
