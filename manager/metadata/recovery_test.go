package metadata

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/managerd/managerd/manager/metadata/boltfile"
	records "github.com/managerd/managerd/protos/metadata"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// world is a database of several pages in two namespaces, with all kinds of records, closed; and its bytes.
func world(t *testing.T) (path string, data []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "good.db")
	db := open(t, path)
	if err := db.Update(golden); err != nil {
		t.Fatal(err)
	}
	for n := range 6 { // commits, so that there are free pages and older versions
		fill(t, db, 60*(n+1))
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, data
}

// keys gives the names of all records, whether they can be decoded or not.
func keys(t *testing.T, db *DB) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	var walk func(b *bolt.Bucket, at string) error
	walk = func(b *bolt.Bucket, at string) error {
		return b.ForEach(func(k, v []byte) error {
			name := fmt.Sprintf("%s/%q", at, k)
			if v == nil {
				return walk(b.Bucket(k), name)
			}
			out[name] = true
			return nil
		})
	}
	if err := db.View(func(tx *Tx) error { return walk(tx.Bucket(Path()...), "") }); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestSalvage damages a database in every way that comes to mind: it is opened all the same, nothing panics, what is not
// on a damaged page is there, the damaged file stands beside it byte by byte, and it is told.
func TestSalvage(t *testing.T) {
	good, data := world(t)
	whole := keys(t, open(t, good))
	page := os.Getpagesize()
	at := func(n int) []byte { return data[n*page:] }
	damage := map[string]func(b []byte) []byte{
		"empty":          func([]byte) []byte { return nil },
		"one byte":       func([]byte) []byte { return []byte("x") },
		"another format": func([]byte) []byte { return bytes.Repeat([]byte("SQLite format 3\x00"), 5000) },
		"both metas":     func(b []byte) []byte { clear(b[:2*page]); return b },
		"metas of another": func(b []byte) []byte {
			copy(b, "magic")
			copy(b[page:], "magic")
			b[16] ^= 1
			b[page+16] ^= 1
			return b
		},
		"short by a page":   func(b []byte) []byte { return b[:len(b)-page] },
		"half":              func(b []byte) []byte { return b[:len(b)/2] },
		"within the metas":  func(b []byte) []byte { return b[:page+20] },
		"zeroes at the end": func(b []byte) []byte { clear(b[len(b)/2:]); return b },
	}
	kinds := map[uint16]int{}
	for n := 2; n < len(data)/page; n++ {
		if binary.NativeEndian.Uint64(at(n)) != uint64(n) {
			continue
		}
		kinds[binary.NativeEndian.Uint16(at(n)[8:])]++
		damage[fmt.Sprintf("page %d zeroed", n)] = func(b []byte) []byte { clear(b[n*page : (n+1)*page]); return b }
		damage[fmt.Sprintf("page %d torn", n)] = func(b []byte) []byte { copy(b[n*page+page/4:(n+1)*page], bytes.Repeat([]byte{0xa5}, page)); return b }
		damage[fmt.Sprintf("page %d of elsewhere", n)] = func(b []byte) []byte { copy(b[n*page:(n+1)*page], b[2*page:3*page]); return b }
		damage[fmt.Sprintf("page %d leads to itself", n)] = func(b []byte) []byte {
			for i := range 20 { // as if its elements were those of a branch
				binary.NativeEndian.PutUint64(b[n*page+16+16*i+8:], uint64(n))
			}
			return b
		}
	}
	if kinds[1] == 0 || kinds[2] < 5 || kinds[0x10] == 0 {
		t.Fatalf("the database has too few pages to be interesting: %v", kinds)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 60 {
		where := make([]int, 1+n%5)
		for i := range where {
			where[i] = r.IntN(len(data))
		}
		damage[fmt.Sprintf("bytes %v", where)] = func(b []byte) []byte {
			for _, i := range where {
				b[i] ^= byte(1 + i%255)
			}
			return b
		}
	}
	salvaged, most := 0, 0
	for name, do := range damage {
		path := filepath.Join(t.TempDir(), "metadata.db")
		broken := do(bytes.Clone(data))
		if err := os.WriteFile(path, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := OpenAnyway(path, true, quiet())
		if err != nil {
			if !errdefs.IsFailedPrecondition(err) || !strings.HasPrefix(name, "bytes") { // a flipped bit may make it of a newer version
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		rec, err := db.Recovery()
		if err != nil {
			t.Fatal(err)
		}
		have := keys(t, db)
		if rec != nil {
			salvaged++
			if was, err := os.ReadFile(rec.Aside); err != nil || !bytes.Equal(was, broken) || rec.Reason != Damaged || len(rec.Damage) == 0 {
				t.Errorf("%s: %v, set aside: %v", name, rec, err)
			}
		} else if len(have) != len(whole) && !strings.HasPrefix(name, "bytes") {
			t.Errorf("%s: %d of %d records are there, and nothing is told", name, len(have), len(whole))
		}
		if strings.HasPrefix(name, "page") { // a page has no more than that
			if lost := len(whole) - len(have); lost > most {
				most = lost
			}
		}
		if name == "both metas" && len(have) != len(whole) {
			t.Errorf("%s: %d of %d records are there", name, len(have), len(whole))
		}
		// It works, and the next start finds nothing new.
		fill(t, db, 3)
		if err := db.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		again, err := OpenAnyway(path, true, quiet())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if r2, err := again.Recovery(); err != nil || !reflect.DeepEqual(r2, rec) {
			t.Errorf("%s: the second time %v, %v", name, r2, err)
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
		if err := checkWhole(path); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if salvaged < 30 {
		t.Errorf("only %d were salvaged", salvaged)
	}
	if most > 150 {
		t.Errorf("%d of %d records were lost with one page", most, len(whole))
	}
}

// checkWhole is bbolt's own opinion.
func checkWhole(path string) error {
	b, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	defer func() { _ = b.Close() }()
	return b.View(func(tx *bolt.Tx) error {
		for err := range tx.Check() {
			return err
		}
		return nil
	})
}

// TestBoltfileAgrees: what is read page by page is what bbolt reads.
func TestBoltfileAgrees(t *testing.T) {
	path, _ := world(t)
	f, err := boltfile.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	c := &collect{}
	metas := f.Metas()
	if len(metas) != 2 || metas[0].TxID != metas[1].TxID+1 {
		t.Fatalf("%v", metas)
	}
	if damage := f.Walk(metas[0], c); len(damage) != 0 {
		t.Errorf("%v", damage)
	}
	var want []string
	b, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }()
	var walk func(b *bolt.Bucket, at []string) error
	walk = func(b *bolt.Bucket, at []string) error {
		return b.ForEach(func(k, v []byte) error {
			if v == nil {
				return walk(b.Bucket(k), append(slices.Clone(at), string(k)))
			}
			want = append(want, fmt.Sprintf("%q %q %q", at, k, v))
			return nil
		})
	}
	if err := b.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error { return walk(b, []string{string(name)}) })
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.lines, want) {
		t.Errorf("%d records, not %d", len(c.lines), len(want))
	}
}

type collect struct{ lines []string }

func (c *collect) Bucket([]string, uint64) {}
func (c *collect) Record(path []string, k, v []byte) {
	c.lines = append(c.lines, fmt.Sprintf("%q %q %q", path, k, v))
}

// TestOlder: a copy from before is told from the database that was used last, a database of elsewhere too, and what was
// killed from both.
func TestOlder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	reason := func() string {
		db, err := OpenAnyway(path, false, quiet())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = db.Close() }()
		r, err := db.Recovery()
		if err != nil {
			t.Fatal(err)
		}
		fill(t, db, 1)
		if r == nil {
			return ""
		}
		if on, err := db.Recovering(PartContent); err != nil || !on {
			t.Errorf("%v, %v", on, err)
		}
		if err := db.Acknowledge(PartContent); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("acknowledged before it was done: %v", err)
		}
		if err := db.Recovered(PartContent, "a note"); err != nil {
			t.Error(err)
		}
		if err := db.Acknowledge(PartContent); err != nil {
			t.Error(err)
		}
		return r.Reason
	}
	if got := reason(); got != "" {
		t.Errorf("a new one: %q", got)
	}
	backup, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := reason(); got != "" {
		t.Errorf("the same: %q", got)
	}
	restore := func(data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	restore(backup)
	if got := reason(); got != Older {
		t.Errorf("a copy from before: %q", got)
	}
	if got := reason(); got != "" {
		t.Errorf("and then: %q", got)
	}
	other := filepath.Join(t.TempDir(), "other.db")
	db := open(t, other)
	fill(t, db, 500)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	restore(data)
	if got := reason(); got != Older {
		t.Errorf("of elsewhere: %q", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if got := reason(); got != Missing {
		t.Errorf("none: %q", got)
	}
	if err := os.Truncate(path+stampSuffix, 7); err != nil { // one that says nothing
		t.Fatal(err)
	}
	if got := reason(); got != "" {
		t.Errorf("without a stamp: %q", got)
	}
}

// TestRecordsOfDamage: a record that cannot be read is not copied, and told.
func TestRecordsOfDamage(t *testing.T) {
	path, _ := world(t)
	db := open(t, path)
	err := db.Update(func(tx *Tx) error {
		return tx.Bucket(Path("one", Containers)...).Put([]byte("bad"), []byte{0xff, 0xff})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := salvage(path, "a test", quiet()); err != nil {
		t.Fatal(err)
	}
	db = open(t, path)
	r, err := db.Recovery()
	if err != nil || r == nil || len(r.Damage) != 2 || !strings.Contains(r.Damage[1], `"bad"`) || r.Salvaged[Containers] < 300 {
		t.Errorf("%v, %v", r, err)
	}
	if err := db.View(func(tx *Tx) error { return Get(tx.Bucket(Path("one", Containers)...), "bad", &records.Container{}) }); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// BenchmarkInspect: what reading all pages costs a start.
func BenchmarkInspect(b *testing.B) {
	path := filepath.Join(b.TempDir(), "metadata.db")
	db, err := Open(path)
	if err != nil {
		b.Fatal(err)
	}
	err = db.Update(func(tx *Tx) error {
		c, err := tx.MakeBucket(Path("one", Containers)...)
		for i := 0; i < 5000 && err == nil; i++ {
			err = Put(c, fmt.Sprintf("c%05d", i), &records.Container{Spec: &records.Any{Value: make([]byte, 6000)}})
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := inspect(path); err != nil {
			b.Fatal(err)
		}
	}
}
