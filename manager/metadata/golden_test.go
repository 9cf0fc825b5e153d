package metadata

import (
	"bytes"
	"compress/gzip"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	records "github.com/managerd/managerd/protos/metadata"
)

var update = flag.Bool("update", false, "write the golden database of the current schema")

// golden is one object of each kind, in two namespaces, as every version must go on reading it.
func golden(tx *Tx) error {
	labels := map[string]string{"containerd.io/gc.root": "2020-01-01", "empty": ""}
	for _, ns := range []string{"default", "k8s.io"} {
		for _, o := range []struct {
			kind, key string
			r         Record
		}{
			{Containers, "c1", &records.Container{
				Labels: labels, Image: "docker.io/library/busybox:latest", RuntimeName: "io.containerd.runc.v2",
				RuntimeOptions: &records.Any{TypeUrl: "options", Value: []byte{1, 2}}, Spec: &records.Any{TypeUrl: "spec", Value: []byte("{}")},
				Snapshotter: "overlayfs", SnapshotKey: "c1", SandboxId: "s", CreatedAt: 1700000000123456789, UpdatedAt: 1700000001000000000,
				Extensions: map[string]*records.Any{"x": {TypeUrl: "t", Value: []byte("v")}},
			}},
			{Images, "docker.io/library/busybox:latest", &records.Image{
				Labels: labels, CreatedAt: 1, UpdatedAt: 2,
				Target: &records.Descriptor{MediaType: "application/vnd.oci.image.index.v1+json", Digest: "sha256:" + strings.Repeat("a", 64),
					Size_: 1234, Annotations: map[string]string{"k": "v"}},
			}},
			{Leases, "l1", &records.Lease{CreatedAt: 3, Labels: map[string]string{"containerd.io/gc.expire": "2030-01-01T00:00:00Z"}}},
			{Content, "sha256:" + strings.Repeat("b", 64), &records.Blob{Size_: 77, CreatedAt: 4, UpdatedAt: 5, Labels: labels}},
		} {
			b, err := tx.MakeBucket(Path(ns, o.kind)...)
			if err == nil {
				err = Put(b, o.key, o.r)
			}
			if err != nil {
				return err
			}
		}
		b, err := tx.MakeBucket(Path(ns, LeaseResources, "l1")...)
		if err != nil {
			return err
		}
		if err := b.Put([]byte("content\x00sha256:"+strings.Repeat("b", 64)), []byte{}); err != nil {
			return err
		}
		if b, err = tx.MakeBucket(Path(ns, Snapshots, "overlayfs")...); err != nil {
			return err
		}
		for i, s := range []*records.Snapshot{{Id: 7, Kind: "committed", Inodes: 3, Size_: 4096}, {Id: 8, Kind: "active", Parent: "s0", Labels: labels}} {
			if err := Put(b, fmt.Sprint("s", i), s); err != nil {
				return err
			}
		}
		if b, err = tx.MakeBucket(Path(ns, Labels)...); err != nil {
			return err
		}
		if err := putLabels(b, map[string]string{"owner": ns}); err != nil {
			return err
		}
	}
	return nil
}

// dump writes every bucket and every record, decoded where it is one of ours.
func dump(tx *Tx) (string, error) {
	var lines []string
	var walk func(b *bolt.Bucket, path []string) error
	walk = func(b *bolt.Bucket, path []string) error {
		return b.ForEach(func(k, v []byte) error {
			at := append(slices.Clone(path), string(k))
			if v == nil {
				return walk(b.Bucket(k), at)
			}
			line := fmt.Sprintf("%q = %q", at, v)
			if len(path) > 2 {
				if r := recordOf(path[2], len(path)); r != nil {
					if err := r.Unmarshal(v); err != nil {
						return fmt.Errorf("%q: %w", at, err)
					}
					line = fmt.Sprintf("%q = %s", at, r)
				}
			}
			lines = append(lines, line)
			return nil
		})
	}
	err := tx.ForEach(func(name []byte, b *bolt.Bucket) error {
		if bytes.Equal(name, identityBucket) {
			return nil // each database has another
		}
		return walk(b, []string{string(name)})
	})
	return strings.Join(lines, "\n") + "\n", err
}

type printed interface {
	Record
	String() string
}

func recordOf(kind string, depth int) printed {
	switch {
	case kind == Containers:
		return &records.Container{}
	case kind == Images:
		return &records.Image{}
	case kind == Leases:
		return &records.Lease{}
	case kind == Content:
		return &records.Blob{}
	case kind == Snapshots && depth > 3:
		return &records.Snapshot{}
	}
	return nil
}

// TestGolden opens the database of every released schema and finds in it what its release wrote. After a change of the
// schema: go test -update, which adds a file and touches none of the old ones.
func TestGolden(t *testing.T) {
	if *update {
		writeGolden(t)
	}
	files, err := filepath.Glob("testdata/schema-*.db.gz")
	if err != nil || len(files) != Schema {
		t.Fatalf("%d golden files for schema %d: %v, %v", len(files), Schema, files, err)
	}
	want := map[string]int{}
	fresh := open(t, filepath.Join(t.TempDir(), "fresh.db"))
	if err := fresh.Update(golden); err != nil {
		t.Fatal(err)
	}
	expected := dumped(t, fresh)
	for _, f := range files {
		want[f]++
		path := filepath.Join(t.TempDir(), "metadata.db")
		unzip(t, f, path)
		if got := dumped(t, open(t, path)); got != expected {
			t.Errorf("%s reads as\n%s\nnot as\n%s", f, got, expected)
		}
	}
	for n := range Schema {
		if name := fmt.Sprintf("testdata/schema-%d.db.gz", n+1); want[name] != 1 {
			t.Errorf("there is no %s, but %v", name, slices.Sorted(maps.Keys(want)))
		}
	}
}

func dumped(t *testing.T, db *DB) (out string) {
	t.Helper()
	err := db.View(func(tx *Tx) (err error) {
		out, err = dump(tx)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func unzip(t *testing.T, from, to string) {
	t.Helper()
	zipped, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func writeGolden(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "metadata.db")
	db := open(t, path)
	if err := db.Update(golden); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(fmt.Sprintf("testdata/schema-%d.db.gz", Schema), b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}
