package native_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

func open(root string) (snapshots.Backend, error) { return native.New(root) }

func stored(root string) (out []string, err error) {
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, err
}

func TestConformance(t *testing.T) { snapshottest.Run(t, open, stored) }
