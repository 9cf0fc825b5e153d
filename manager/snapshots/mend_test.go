package snapshots_test

import (
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

// ailing has storage that does not work.
type ailing struct {
	*native.Backend
	problems map[uint64]string
}

func (a ailing) Broken() (map[uint64]string, error) { return a.problems, nil }

func (a ailing) Mend(id uint64) error {
	delete(a.problems, id)
	return nil
}

// TestBroken: what does not work is named with its namespace and key; what has no record is not in it.
func TestBroken(t *testing.T) {
	dir := t.TempDir()
	a := ailing{problems: map[uint64]string{1: "it is ill", 99: "nobody knows it"}}
	e, _ := snapshottest.Open(t, dir, func(root string) (b snapshots.Backend, err error) {
		a.Backend, err = native.New(root)
		return a, err
	})
	for _, key := range []string{"k", "well"} {
		_, err := e.S.Prepare(e.Ctx, key, "", nil)
		e.Must(err)
	}
	found, err := e.Store.Broken(snapshottest.Name)
	e.Must(err)
	want := snapshots.Broken{Stored: snapshots.Stored{ID: 1, Namespace: "one", Key: "k"}, Problem: "it is ill"}
	if len(found) != 1 || found[0] != want {
		t.Errorf("%+v", found)
	}
	e.Must(e.Store.Mend(snapshottest.Name, 1))
	if found, err := e.Store.Broken(snapshottest.Name); err != nil || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}

	b, err := native.New(filepath.Join(dir, "plain"))
	e.Must(err)
	e.Must(e.Store.Add(e.Ctx, "plain", b))
	for _, name := range []string{"plain", "none"} {
		if found, err := e.Store.Broken(name); err != nil || len(found) > 0 {
			t.Errorf("%s: %+v, %v", name, found, err)
		}
	}
	e.Is(e.Store.Mend("plain", 1), errdefs.ErrNotImplemented)
	e.Is(e.Store.Mend("none", 1), errdefs.ErrFailedPrecondition)
}
