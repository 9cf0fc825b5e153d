package metadata

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	records "github.com/managerd/managerd/protos/metadata"
)

// Why a database is not what it was.
const (
	Damaged = "damaged" // it could not be read, or not all of it
	Missing = "missing" // there was none, in a place that has been used
	Older   = "older"   // it is a copy from before
)

// The parts that are made again from what is on disk; of snapshots, one for each snapshotter.
const (
	PartContainers = "containers"
	PartContent    = "content"
	PartSnapshots  = "snapshots/" // + the snapshotter's name
)

// RecoveredLabel, the time of it, is on what was made again without knowing its labels.
const RecoveredLabel = "managerd.io/recovered"

// recoveryBucket stands at the top: "record" → metadata.Recovery, as long as nobody has acknowledged it.
const recoveryBucket, recoveryKey = "recovery", "record"

// maxNotes is how many of its damages and notes a recovery keeps; the log has all.
const maxNotes = 100

// Recovery tells what happened to the database, nil when nothing did or somebody has acknowledged it. Until then whoever
// frees what no record names (content, snapshots) does not: the record may be what was lost.
func (db *DB) Recovery() (r *records.Recovery, err error) {
	err = db.View(func(tx *Tx) error {
		found := &records.Recovery{}
		err := Get(tx.Bucket(recoveryBucket), recoveryKey, found)
		if errdefs.IsNotFound(err) {
			return nil
		}
		r = found
		return err
	})
	return r, err
}

// Recovering says whether a part is still to be made again from what is on disk.
func (db *DB) Recovering(part string) (bool, error) {
	r, err := db.Recovery()
	return r != nil && !slices.Contains(r.Done, part), err
}

// Recovered notes that a part was made again, and what there is to say of it.
func (db *DB) Recovered(part string, notes ...string) error {
	return db.Update(func(tx *Tx) error {
		r := &records.Recovery{}
		if err := Get(tx.Bucket(recoveryBucket), recoveryKey, r); err != nil {
			return err
		}
		if !slices.Contains(r.Done, part) {
			r.Done = append(r.Done, part)
		}
		r.Notes = append(r.Notes, notes...)
		if n := len(r.Notes); n > maxNotes {
			r.Notes = append(r.Notes[:maxNotes-1], fmt.Sprintf("and %d more, see the log", n-maxNotes+1))
		}
		return Put(tx.Bucket(recoveryBucket), recoveryKey, r)
	})
}

// Acknowledge ends a recovery: what no record names may be freed from now on. FailedPrecondition while a part of those
// given is not done.
func (db *DB) Acknowledge(parts ...string) error {
	return db.Update(func(tx *Tx) error {
		r := &records.Recovery{}
		if err := Get(tx.Bucket(recoveryBucket), recoveryKey, r); errdefs.IsNotFound(err) {
			return nil
		} else if err != nil && !errdefs.IsDataLoss(err) {
			return err
		}
		for _, p := range parts {
			if !slices.Contains(r.Done, p) {
				return fmt.Errorf("the recovery of %s is not done yet: %w", p, errdefs.ErrFailedPrecondition)
			}
		}
		return tx.DeleteBucket([]byte(recoveryBucket))
	})
}

// beginRecovery enters that the database is not what it was; parts that an earlier recovery made are to be made again.
func beginRecovery(tx *Tx, r *records.Recovery) error {
	r.Version, r.At = 1, time.Now().UnixNano()
	if n := len(r.Damage); n > maxNotes {
		r.Damage = append(slices.Clone(r.Damage[:maxNotes-1]), fmt.Sprintf("and %d more", n-maxNotes+1))
	}
	b, err := tx.MakeBucket(recoveryBucket)
	if err != nil {
		return err
	}
	before := &records.Recovery{}
	if err := Get(b, recoveryKey, before); err == nil && r.Aside == "" {
		r.Aside = before.Aside
	} else if err != nil && !errors.Is(err, errdefs.ErrNotFound) && !errdefs.IsDataLoss(err) {
		return err
	}
	return Put(b, recoveryKey, r)
}
