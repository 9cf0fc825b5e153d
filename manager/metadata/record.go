package metadata

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Record is a value of protos/metadata.
type Record interface {
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
}

type pointer[T any] interface {
	*T
	Record
}

// Put writes r below key: InvalidArgument when key is empty or longer than the database can hold (32 KiB).
func Put(b *bolt.Bucket, key string, r Record) error {
	v, err := r.Marshal()
	if err != nil {
		return fmt.Errorf("cannot encode record %q: %w", key, err)
	}
	err = b.Put([]byte(key), v)
	if errors.Is(err, bolterrors.ErrKeyTooLarge) || errors.Is(err, bolterrors.ErrKeyRequired) || errors.Is(err, bolterrors.ErrValueTooLarge) {
		return fmt.Errorf("name of %d bytes with a record of %d bytes: %w: %w", len(key), len(v), err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("cannot write record %q: %w", key, err)
	}
	return nil
}

// Get reads the record below key into r, which must be empty. NotFound, also when b is nil; DataLoss when it is damaged.
func Get(b *bolt.Bucket, key string, r Record) error {
	var v []byte
	if b != nil && key != "" {
		v = b.Get([]byte(key))
	}
	if v == nil {
		return fmt.Errorf("%q: %w", key, errdefs.ErrNotFound)
	}
	if err := r.Unmarshal(v); err != nil {
		return fmt.Errorf("record of %q is damaged: %w: %w", key, err, errdefs.ErrDataLoss)
	}
	return nil
}

// Each calls fn for every record of b (nil: none) in the order of the keys. A damaged record is logged and left out, so
// that it takes no other away; whoever deletes by what it has not seen needs EachStrict.
func Each[T any, P pointer[T]](b *bolt.Bucket, fn func(key string, r P) error) error {
	return each(b, fn, false)
}

// EachStrict is Each, but a damaged record ends it with DataLoss.
func EachStrict[T any, P pointer[T]](b *bolt.Bucket, fn func(key string, r P) error) error {
	return each(b, fn, true)
}

func each[T any, P pointer[T]](b *bolt.Bucket, fn func(key string, r P) error, strict bool) error {
	if b == nil {
		return nil
	}
	return b.ForEach(func(k, v []byte) error {
		if v == nil {
			return nil // a bucket
		}
		r := P(new(T))
		if err := r.Unmarshal(v); err != nil {
			if strict {
				return fmt.Errorf("record of %q is damaged: %w: %w", k, err, errdefs.ErrDataLoss)
			}
			slog.Error("a damaged record was left out", "key", string(k), "error", err)
			return nil
		}
		return fn(string(k), r)
	})
}

// Time is the inverse of UnixNano as records keep it: 0 is the zero time.
func Time(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

// EachDamaged calls fn for every record of a namespace that cannot be read.
func EachDamaged(tx *Tx, ns string, fn func(path []string, key string, cause error) error) error {
	var walk func(b *bolt.Bucket, path []string, make func() Record) error
	walk = func(b *bolt.Bucket, path []string, make func() Record) error {
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			if v == nil {
				return walk(b.Bucket(k), append(path[:len(path):len(path)], string(k)), make)
			}
			if err := make().Unmarshal(v); err != nil {
				return fn(path, string(k), err)
			}
			return nil
		})
	}
	for _, kind := range []string{Containers, Sandboxes, Images, Leases, Content, Snapshots} {
		path := Path(ns, kind)
		if err := walk(tx.Bucket(path...), path, parse[kind]); err != nil {
			return err
		}
	}
	return nil
}

// damagedBucket keeps, at the top, records that were set aside, by their path.
const damagedBucket = "damaged"

// SetAside moves the record key of the bucket at path to where nobody reads it. NotFound when it is not there.
func (db *DB) SetAside(path []string, key string) error {
	return db.Update(func(tx *Tx) error {
		b := tx.Bucket(path...)
		var v []byte
		if b != nil {
			v = b.Get([]byte(key))
		}
		if v == nil {
			return fmt.Errorf("record %q of bucket %q: %w", key, path, errdefs.ErrNotFound)
		}
		to, err := tx.MakeBucket(append([]string{damagedBucket}, path...)...)
		if err != nil {
			return err
		}
		if err := to.Put([]byte(key), append([]byte{}, v...)); err != nil {
			return err
		}
		return b.Delete([]byte(key))
	})
}
