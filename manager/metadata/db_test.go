package metadata

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	records "github.com/managerd/managerd/protos/metadata"
)

func open(t *testing.T, path string) *DB {
	t.Helper()
	db, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// setSchema writes a schema version as it stands in the file.
func setSchema(t *testing.T, path string, v []byte) {
	t.Helper()
	b, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = b.Update(func(tx *bolt.Tx) error {
		s, err := tx.CreateBucketIfNotExists(schemaBucket)
		if err != nil {
			return err
		}
		return s.Put(schemaKey, v)
	})
	if err := errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	version := func(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }
	for _, c := range []struct {
		name string
		make func(t *testing.T, path string)
		is   func(error) bool
		says string
	}{
		{"newer", func(t *testing.T, p string) { setSchema(t, p, version(Schema+1)) }, errdefs.IsFailedPrecondition,
			fmt.Sprintf("schema version is %d, this managerd knows %d", Schema+1, Schema)},
		{"much newer", func(t *testing.T, p string) { setSchema(t, p, version(1<<31)) }, errdefs.IsFailedPrecondition, "run the version that wrote it"},
		{"older than any", func(t *testing.T, p string) { setSchema(t, p, version(0)) }, errdefs.IsFailedPrecondition, "schema version is 0"},
		{"strange version", func(t *testing.T, p string) { setSchema(t, p, []byte("1")) }, errdefs.IsDataLoss, "must be 4"},
		{"no buckets", func(t *testing.T, p string) { setSchema(t, p, version(Schema)) }, errdefs.IsDataLoss, `"v1" is missing`},
		{"a directory", func(t *testing.T, p string) {
			if err := os.Mkdir(p, 0o700); err != nil {
				t.Fatal(err)
			}
		}, func(error) bool { return true }, "is a directory"},
		{"garbage", func(t *testing.T, p string) {
			if err := os.WriteFile(p, bytes.Repeat([]byte("no database "), 10000), 0o600); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsDataLoss, "restore a copy"},
		{"short garbage", func(t *testing.T, p string) {
			if err := os.WriteFile(p, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsDataLoss, "restore a copy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "metadata.db")
			c.make(t, path)
			db, err := Open(path)
			if err == nil {
				t.Fatal("it was opened")
			}
			if db != nil || !c.is(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v, %v", db, err)
			}
			again, err2 := Open(path) // nothing holds the file
			if err2 == nil || err2.Error() != err.Error() || again != nil {
				t.Errorf("the second time: %v", err2)
			}
		})
	}
}

// TestDamaged cuts a good database short, and overwrites each of its pages: it is opened or refused with its name, and
// nothing else happens; what can be read of it is read or is an error.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.db")
	db := open(t, good)
	fill(t, db, 300)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	refused, tried := 0, 0
	try := func(name string, data []byte) {
		tried++ // a file each: when bolt panics, it keeps the old one locked
		path := filepath.Join(dir, fmt.Sprintf("damaged%d.db", tried))
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := Open(path)
		if err != nil {
			refused++
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "damaged") {
				t.Errorf("%s: %v", name, err)
			}
			return
		}
		if err := db.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := len(data) - page; n > 0; n -= page {
		try(fmt.Sprintf("cut to %d bytes", n), data[:n])
	}
	try("cut within a page", data[:page+100])
	if refused == 0 {
		t.Error("no short file was refused")
	}
	for at := 0; at < len(data); at += page {
		broken := bytes.Clone(data)
		copy(broken[at:], bytes.Repeat([]byte{0xa5}, page))
		try(fmt.Sprintf("page %d", at/page), broken)
	}
}

// fill makes n containers.
func fill(t *testing.T, db *DB, n int) {
	t.Helper()
	err := db.Update(func(tx *Tx) error {
		b, err := tx.MakeBucket(Path("one", Containers)...)
		for i := 0; i < n && err == nil; i++ {
			err = Put(b, fmt.Sprintf("c%04d", i), &records.Container{Image: strings.Repeat("i", 200)})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestHeld(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	open(t, path)
	_, err := Open(path)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "another process") {
		t.Error(err)
	}
}

func TestUpgrade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	db := open(t, path)
	fill(t, db, 1)
	var ran []uint32
	step := func(n uint32, fail bool) func(*Tx) error {
		return func(tx *Tx) error {
			ran = append(ran, n)
			if err := Put(tx.Bucket(Path("one", Containers)...), fmt.Sprint("from", n), &records.Container{}); err != nil || !fail {
				return err
			}
			return errors.New("no more")
		}
	}
	stored := func() (v uint32, keys string) {
		err := db.View(func(tx *Tx) error {
			v = binary.LittleEndian.Uint32(tx.Bucket(string(schemaBucket)).Get(schemaKey))
			return tx.Bucket(Path("one", Containers)...).ForEach(func(k, _ []byte) error {
				keys += string(k) + " "
				return nil
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		return v, keys
	}
	// One step fails: all is as it was.
	err := db.Update(func(tx *Tx) error {
		return migrate(tx, 3, map[uint32]func(*Tx) error{1: step(1, false), 2: step(2, true)})
	})
	if err == nil || !strings.Contains(err.Error(), "schema version 2 to 3") {
		t.Error(err)
	}
	if v, keys := stored(); v != 1 || keys != "c0000 " {
		t.Errorf("after a failed upgrade: version %d with %s", v, keys)
	}
	ran = nil
	both := map[uint32]func(*Tx) error{1: step(1, false), 2: step(2, false)}
	for range 2 { // the second time there is nothing to do
		if err := db.Update(func(tx *Tx) error { return migrate(tx, 3, both) }); err != nil {
			t.Fatal(err)
		}
	}
	if v, keys := stored(); v != 3 || keys != "c0000 from1 from2 " || len(ran) != 2 {
		t.Errorf("version %d with %s, steps %v", v, keys, ran)
	}
	// What this code knows is older now. The database says that this version may work with it, and stays what it is; then
	// that it may not.
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db, err = Open(path)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, db, 2)
	if v, _ := stored(); v != 3 {
		t.Errorf("an older version has made it %d", v)
	}
	err = db.Update(func(tx *Tx) error { return tx.Bucket(string(schemaBucket)).Put(readableKey, []byte{2, 0, 0, 0}) })
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	for _, open := range []func(string) (*DB, error){Open, func(path string) (*DB, error) { return OpenAnyway(path, true, slog.Default()) }} {
		if _, err := open(path); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "schema version is 3") {
			t.Error(err)
		}
	}
}

// TestOpenWritesNothing: a database that is as it was left is opened without a write, which would wait for the disk.
func TestOpenWritesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	var before []byte
	for i := range 3 {
		db, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			err = db.Update(func(tx *Tx) error { _, err := tx.MakeBucket(Path("ns")...); return err })
		}
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && !bytes.Equal(data, before) {
			t.Errorf("start %d has written", i)
		}
		before = data
	}
	if err := os.Remove(path + stampSuffix); err != nil {
		t.Fatal(err)
	}
	db, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path + stampSuffix); err != nil || fi.Size() == 0 {
		t.Errorf("the stamp is not made again: %v", err)
	}
}
