package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/managerd/managerd/manager/metadata/boltfile"
	records "github.com/managerd/managerd/protos/metadata"
)

// asideSuffix, and a time, is what a damaged database is called from then on. It is never removed.
const asideSuffix = ".damaged-"

// parse reads the value of a record of each kind.
var parse = map[string]func() Record{
	Containers: func() Record { return &records.Container{} },
	Images:     func() Record { return &records.Image{} },
	Leases:     func() Record { return &records.Lease{} },
	Sandboxes:  func() Record { return &records.Sandbox{} },
	Content:    func() Record { return &records.Blob{} },
	Snapshots:  func() Record { return &records.Snapshot{} },
}

// salvage makes a new database of what can be read of the one at path, and sets that aside: there is at each moment one of
// the two at path. FailedPrecondition when it is of a version that this code must not touch.
func salvage(path, why string, log *slog.Logger) error {
	half := path + ".salvaged"
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) { // of an attempt that was cut off
		return err
	}
	aside := freshName(path + asideSuffix + time.Now().UTC().Format("20060102T150405Z"))
	r := &records.Recovery{Reason: Damaged, Aside: aside, Damage: []string{why}, Salvaged: map[string]int64{}}
	to, err := bolt.Open(half, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = to.Update(func(btx *bolt.Tx) error {
		tx := &Tx{Tx: btx}
		if err := copyReadable(tx, path, r, log); err != nil {
			return err
		}
		if _, err := tx.MakeBucket(Path()...); err != nil {
			return err
		}
		return beginRecovery(tx, r)
	})
	if err = errors.Join(err, to.Close()); err != nil {
		return err
	}
	if err := os.Link(path, aside); err != nil {
		return err
	}
	if err := os.Rename(half, path); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return err
	}
	log.Error("the database was damaged: what could be read of it was copied into a new one, the rest is made again from what is on disk",
		"database", path, "set_aside", aside, "salvaged", r.Salvaged, "damage", r.Damage)
	return nil
}

func freshName(name string) string {
	for n := 1; ; n++ {
		try := name
		if n > 1 {
			try = fmt.Sprintf("%s.%d", name, n)
		}
		if _, err := os.Lstat(try); errors.Is(err, fs.ErrNotExist) {
			return try
		}
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// copyReadable copies into tx what can be read. What the newest version of the damaged database does not give is taken from
// the one before, which the file still has as long as nothing was written over it.
func copyReadable(tx *Tx, path string, r *records.Recovery, log *slog.Logger) error {
	f, err := boltfile.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	versions := f.Metas()
	if len(versions) == 0 {
		r.Damage = append(r.Damage, "no meta page is whole")
		versions = best(f, f.Search(root))
	}
	var lost []boltfile.Damage
	for i, v := range versions {
		c := &copier{tx: tx, r: r}
		if i > 0 {
			c.within = lost
		}
		damage := f.Walk(v, c)
		if c.err != nil {
			return c.err
		}
		for _, d := range damage {
			if i == 0 {
				r.Damage = append(r.Damage, d.String())
				log.Error("the database is damaged", "database", path, "damage", d.String())
			}
		}
		if i == 0 {
			if err := c.readable(); err != nil {
				return err
			}
			lost = slices.DeleteFunc(damage, func(d boltfile.Damage) bool { return !d.Lost })
		}
		if len(lost) == 0 {
			break
		}
	}
	return nil
}

// best gives the version of which most can be read, among those that may be one.
func best(f *boltfile.File, candidates []boltfile.Root) []boltfile.Root {
	var found []boltfile.Root
	fewest, most := 0, -1
	for _, c := range candidates {
		n := &counter{}
		damage := len(f.Walk(c, n))
		if len(found) == 0 || damage < fewest || damage == fewest && n.records > most {
			found, fewest, most = []boltfile.Root{c}, damage, n.records
		}
	}
	return found
}

type counter struct{ records int }

func (c *counter) Bucket([]string, uint64)         {}
func (c *counter) Record([]string, []byte, []byte) { c.records++ }

// copier copies what a walk finds.
type copier struct {
	tx     *Tx
	r      *records.Recovery
	within []boltfile.Damage // set: only what is missing in these buckets, and below them
	err    error             // of the new database
	bucket *bolt.Bucket
	at     []string
}

func (c *copier) wanted(path []string) bool {
	if c.err != nil || path[0] == recoveryBucket {
		return false
	}
	return c.within == nil || slices.ContainsFunc(c.within, func(d boltfile.Damage) bool {
		return len(d.Bucket) <= len(path) && slices.Equal(d.Bucket, path[:len(d.Bucket)])
	})
}

func (c *copier) Bucket(path []string, sequence uint64) {
	if !c.wanted(path) {
		return
	}
	b, err := c.tx.MakeBucket(path...)
	if err == nil && b.Sequence() < sequence {
		err = b.SetSequence(sequence)
	}
	c.err = err
	c.bucket, c.at = b, path
}

func (c *copier) Record(path []string, key, value []byte) {
	if len(path) == 0 || !c.wanted(path) { // at the top there are only buckets
		return
	}
	if !slices.Equal(path, c.at) {
		if c.bucket, c.err = c.tx.MakeBucket(path...); c.err != nil {
			return
		}
		c.at = path
	}
	if c.within != nil && c.bucket.Get(key) != nil {
		return
	}
	kind := path[0]
	if len(path) > 2 && path[0] == root {
		kind = path[2]
		if make := parse[kind]; make != nil {
			if err := make().Unmarshal(value); err != nil {
				c.r.Damage = append(c.r.Damage, fmt.Sprintf("record %q of bucket %q: %v", key, path, err))
				return
			}
		}
	}
	if c.err = c.bucket.Put(key, value); c.err == nil {
		c.r.Salvaged[kind]++
	}
}

// readable refuses to go on with a database of a version that this code does not know, and makes a version that cannot be
// read this code's own.
func (c *copier) readable() error {
	b, err := c.tx.MakeBucket(string(schemaBucket))
	if err != nil {
		return err
	}
	v := b.Get(schemaKey)
	if len(v) == 4 {
		if n := binary.LittleEndian.Uint32(v); n > Schema && minReader(b) > Schema {
			return fmt.Errorf("it is damaged, and %w", tooNew(n, Schema))
		} else if n != 0 {
			return nil
		}
	}
	return b.Put(schemaKey, binary.LittleEndian.AppendUint32(nil, Schema))
}
