package snapshottest

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
)

// BenchmarkPrepare measures what every start of a container pays.
func BenchmarkPrepare(b *testing.B, backend func(root string) (snapshots.Backend, error)) {
	dir := b.TempDir()
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	be, err := backend(filepath.Join(dir, "root"))
	if err != nil {
		b.Fatal(err)
	}
	ctx := namespaces.With(context.Background(), "bench")
	store, err := snapshots.NewStore(ctx, db, &Events{}, map[string]snapshots.Backend{Name: be})
	if err != nil {
		b.Fatal(err)
	}
	s, err := store.Snapshotter(Name)
	if err != nil {
		b.Fatal(err)
	}
	parent := ""
	for i := range 10 {
		key, name := fmt.Sprint("a", i), fmt.Sprint("l", i)
		if _, err := s.Prepare(ctx, key, parent, nil); err != nil {
			b.Fatal(err)
		}
		if err := s.Commit(ctx, name, key, nil); err != nil {
			b.Fatal(err)
		}
		parent = name
	}
	i := 0
	for b.Loop() {
		if _, err := s.Prepare(ctx, fmt.Sprint("k", i), parent, nil); err != nil {
			b.Fatal(err)
		}
		i++
	}
}
