package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

// TestRestore: of a database that is lost, what an image leads to is known in its namespace alone, with references; what
// nobody names in all of them if content is shared, else nowhere; a blob that is damaged is set aside. Each is told, in its
// namespace, by the database's own events.
func TestRestore(t *testing.T) {
	for _, policy := range []string{Shared, Isolated} {
		t.Run(policy, func(t *testing.T) {
			ctx, e := newEnv(t, policy)
			layer := e.add(ctx, "a layer", nil)
			manifest := e.add(ctx, fmt.Sprintf(`{"layers":[{"digest":%q}]}`, layer), nil)
			stray, bad := e.add(ctx, "whose?", nil), e.add(ctx, "was good", nil)
			if err := errors.Join(os.Chmod(e.path(bad), 0o600), os.WriteFile(e.path(bad), []byte("is not!!"), 0o600), e.db.Close()); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(e.dir, "metadata.db")
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			var err error
			if e.db, err = metadata.OpenAnyway(file, true, slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil {
				t.Fatal(err)
			}
			told := map[string]int{}
			err = e.db.Deliver(func(_ string, _ uint64, m *types.Envelope) error {
				told[m.Namespace+" "+m.Topic]++
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if e.Store, err = New(e.dir, policy, e.db, e.db); err != nil {
				t.Fatal(err)
			}
			err = e.db.Update(func(tx *metadata.Tx) error {
				for _, ns := range []string{"one", "two"} {
					b, err := tx.MakeBucket(metadata.Path(ns, metadata.Images)...)
					if err != nil {
						return err
					}
					if ns == "one" {
						err = metadata.Put(b, "image", &records.Image{Target: &records.Descriptor{Digest: manifest.String()}})
					}
					if err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second finds nothing to do
				if err := e.Restore(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
			if on, err := e.db.Recovering(metadata.PartContent); err != nil || on {
				t.Errorf("still to be done: %v, %v", on, err)
			}
			known := func(ns string, d digest.Digest) map[string]string {
				i, err := e.Info(namespaces.With(ctx, ns), d)
				if err != nil {
					return nil
				}
				if i.Labels == nil {
					i.Labels = map[string]string{}
				}
				return i.Labels
			}
			if l := known("one", manifest); l[labelRef+".0"] != layer.String() || known("one", layer) == nil {
				t.Errorf("the image's: %v, %v", l, known("one", layer))
			}
			if known("two", manifest) != nil || known("two", layer) != nil || known("one", bad) != nil {
				t.Error("it is known where it does not belong")
			}
			want := map[string]int{"one /content/create": 2}
			if policy == Shared {
				want = map[string]int{"one /content/create": 3, "two /content/create": 1}
			}
			for _, ns := range []string{"one", "two"} {
				if l := known(ns, stray); (l != nil) != (policy == Shared) || l != nil && (l[labelRoot] == "" || l[metadata.RecoveredLabel] == "") {
					t.Errorf("%s: what nobody names: %v", ns, l)
				}
			}
			if !reflect.DeepEqual(told, want) {
				t.Errorf("told %v, not %v", told, want)
			}
			if _, err := os.Stat(filepath.Join(e.dir, Dir, damagedDir, "sha256-"+bad.Encoded())); err != nil {
				t.Error(err)
			}
			if _, err := e.backend.Stat(ctx, stray); err != nil {
				t.Error(err)
			}
		})
	}
}
