package metadata

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/metadata/boltfile"
	records "github.com/managerd/managerd/protos/metadata"
)

// Open opens or makes the database at path. A database of a newer schema is refused with FailedPrecondition, unless that
// says that this version may work with it, one that another process holds with Unavailable, a damaged one with DataLoss.
func Open(path string) (*DB, error) {
	db, err := openFile(path)
	if errdefs.IsDataLoss(err) {
		err = fmt.Errorf("it is damaged, restore a copy or move it away: %w", err)
	}
	return db, named(path, err)
}

func named(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("cannot open %s: %w", path, err)
}

// OpenAnyway is Open for a daemon that must start: of a damaged database it sets the file aside and goes on with what can
// be read of it. used says that there is something below the daemon's directories, so that a database that is missing was
// lost. What is to be made again then, also because the database is a copy from before, Recovery tells.
func OpenAnyway(path string, used bool, log *slog.Logger) (*DB, error) {
	_, err := os.Stat(path)
	missing := errors.Is(err, fs.ErrNotExist)
	if _, err := os.Stat(path + stampSuffix); err == nil {
		used = true
	}
	db, err := openFile(path)
	if errdefs.IsDataLoss(err) {
		if err = salvage(path, err.Error(), log); err != nil {
			return nil, fmt.Errorf("cannot salvage what can be read of %s: %w", path, err)
		}
		db, err = openFile(path)
	}
	if err != nil {
		return nil, named(path, err)
	}
	var lost *records.Recovery
	if missing && used {
		lost = &records.Recovery{Reason: Missing, Damage: []string{"there was no database at " + path}}
	} else if db.older != "" {
		if r, err := db.Recovery(); err != nil || r == nil || r.Reason != Damaged || len(r.Done) > 0 {
			lost = &records.Recovery{Reason: Older, Damage: []string{db.older}}
		}
	}
	if lost != nil {
		log.Error("the database is not the one that was used last: what it does not know is made again from what is on disk",
			"database", path, "reason", lost.Damage[0])
		if err := db.Update(func(tx *Tx) error { return beginRecovery(tx, lost) }); err != nil {
			return nil, errors.Join(err, db.Close())
		}
	}
	return db, nil
}

func openFile(path string) (db *DB, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := create(path); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	case fi.IsDir():
		return nil, unix.EISDIR
	default:
		if err := inspect(path); err != nil {
			return nil, err
		}
	}
	db = &DB{box: newOutbox()}
	defer func() {
		if err == nil {
			return
		}
		if db.bolt != nil {
			err = errors.Join(err, db.Close())
		}
		db = nil
	}()
	if db.bolt, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType}); err != nil {
		if errors.Is(err, bolterrors.ErrTimeout) {
			err = errHeld
		}
		return db, err
	}
	if db.stamp, db.older, err = openStamp(path, db.bolt); err != nil {
		return db, err
	}
	if current := false; db.stamp.known {
		// A commit would wait for the disk, and so would every client of a daemon that was just started again.
		if err = db.View(func(tx *Tx) error { current = isCurrent(tx); return nil }); err != nil || current {
			return db, err
		}
	}
	err = db.Update(func(tx *Tx) error {
		if err := migrate(tx, Schema, upgrades); err != nil {
			return err
		}
		return db.stamp.identify(tx)
	})
	return db, err
}

var errHeld = fmt.Errorf("another process has it open: %w", errdefs.ErrUnavailable)

// create makes an empty database; it is there whole or not at all.
func create(path string) error {
	half := path + ".new"
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := bolt.Open(half, 0o600, nil)
	if err != nil {
		return err
	}
	err = b.Update(func(tx *bolt.Tx) error { return migrate(&Tx{Tx: tx}, Schema, upgrades) })
	if err = errors.Join(err, b.Close()); err != nil {
		return err
	}
	if err := os.Rename(half, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// inspect reads every page that is in use: bbolt works only with what is whole. DataLoss says what is not.
func inspect(path string) error {
	lock, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	for deadline := time.Now().Add(time.Second); unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil; {
		if time.Now().After(deadline) {
			return errHeld
		}
		time.Sleep(10 * time.Millisecond) // flock(2) cannot wait with a deadline
	}
	f, err := boltfile.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	metas := f.Metas()
	if len(metas) == 0 {
		return fmt.Errorf("no meta page of its %d bytes is whole: %w", f.Size(), errdefs.ErrDataLoss)
	}
	if damage := f.Walk(metas[0], nil); len(damage) > 0 {
		more := ""
		if len(damage) > 1 {
			more = fmt.Sprintf(", and %d more", len(damage)-1)
		}
		return fmt.Errorf("%s%s: %w", damage[0], more, errdefs.ErrDataLoss)
	}
	return nil
}

// commit runs fn in one transaction and stamps it.
func (db *DB) commit(fn func(*bolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = damageOf(p)
		}
	}()
	var id uint64
	err = db.bolt.Update(func(tx *bolt.Tx) error {
		id = uint64(tx.ID())
		return fn(tx)
	})
	if err == nil {
		if serr := db.stamp.write(id); serr != nil {
			slog.Warn("cannot note how far the database has come", "error", serr)
		}
	}
	return err
}

// damageOf makes an error of what bbolt panics with when a page makes no sense, or cannot be read.
func damageOf(p any) error {
	slog.Error("the database cannot be read; start managerd again, which sets it aside and salvages what can be", "panic", p, "stack", string(debug.Stack()))
	return fmt.Errorf("the database is damaged: %v: %w", p, errdefs.ErrDataLoss)
}

// fromBolt says, in a deferred function that recovered p, whether it was bbolt that panicked, or a page that cannot be read.
func fromBolt(p any) bool {
	if _, ok := p.(interface{ Addr() uintptr }); ok {
		return true
	}
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	panicked := false
	for {
		f, more := frames.Next()
		switch {
		case strings.HasPrefix(f.Function, "runtime."):
			panicked = panicked || f.Function == "runtime.gopanic"
		case panicked:
			return strings.HasPrefix(f.Function, "go.etcd.io/bbolt")
		}
		if !more {
			return false
		}
	}
}
