package metadata

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestNamespaces(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "metadata.db"))
	n := NewNamespaces(db)
	labels := map[string]string{"a": "1", "b.c": "2"}
	if err := n.Create("one", labels); err != nil {
		t.Fatal(err)
	}
	if err := n.Create("one", nil); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), `"one"`) {
		t.Errorf("twice: %v", err)
	}
	for _, bad := range []string{"", "a/b", "..", strings.Repeat("n", 77)} {
		if err := n.Create(bad, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("create %q: %v", bad, err)
		}
		if _, err := n.Labels(bad); !errdefs.IsNotFound(err) {
			t.Errorf("labels of %q: %v", bad, err)
		}
		if _, err := n.SetLabels(bad, nil); !errdefs.IsNotFound(err) {
			t.Errorf("set labels of %q: %v", bad, err)
		}
		if err := n.Delete(bad); !errdefs.IsNotFound(err) {
			t.Errorf("delete %q: %v", bad, err)
		}
	}
	for name, labels := range map[string]map[string]string{"long": {"k": strings.Repeat("v", 5000)}, "nokey": {"": "v"}} {
		if err := n.Create(name, labels); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := n.Labels(name); !errdefs.IsNotFound(err) {
			t.Errorf("%s is half-made: %v", name, err)
		}
	}
	for _, c := range []struct {
		set   map[string]string
		paths []string
		want  map[string]string
	}{
		{map[string]string{"a": "3", "x": "9"}, []string{"labels.a"}, map[string]string{"a": "3", "b.c": "2"}},
		{map[string]string{"b.c": "4"}, []string{"labels.b.c", "labels.a"}, map[string]string{"b.c": "4"}},
		{map[string]string{"n": "1"}, []string{"labels"}, map[string]string{"n": "1"}},
		{map[string]string{"m": "1"}, nil, map[string]string{"m": "1"}},
	} {
		out, err := n.SetLabels("one", c.set, c.paths...)
		if got, err2 := n.Labels("one"); err != nil || err2 != nil || !reflect.DeepEqual(got, c.want) || !reflect.DeepEqual(out, c.want) {
			t.Errorf("%v of %v: %v, %v, %v, %v", c.paths, c.set, out, got, err, err2)
		}
	}
	if _, err := n.SetLabels("one", nil, "name"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `"name"`) {
		t.Errorf("unknown field: %v", err)
	}
	fillIn := func(ns string) {
		if err := db.Update(func(tx *Tx) error {
			b, err := tx.MakeBucket(Path(ns, Snapshots, "overlayfs")...)
			if err != nil {
				return err
			}
			return b.Put([]byte("k"), []byte("v"))
		}); err != nil {
			t.Fatal(err)
		}
	}
	fillIn("one")
	fillIn("two") // an object makes its namespace
	if names, err := n.List(); err != nil || !reflect.DeepEqual(names, []string{"one", "two"}) {
		t.Errorf("%v, %v", names, err)
	}
	if err := n.Delete("one"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"one" must be empty, it has 1 snapshots`) {
		t.Errorf("not empty: %v", err)
	}
	if err := db.Update(func(tx *Tx) error { return tx.Bucket(Path("one", Snapshots, "overlayfs")...).Delete([]byte("k")) }); err != nil {
		t.Fatal(err)
	}
	if err := n.Delete("one"); err != nil {
		t.Fatal(err)
	}
	if names, err := n.List(); err != nil || !reflect.DeepEqual(names, []string{"two"}) {
		t.Errorf("%v, %v", names, err)
	}
}
