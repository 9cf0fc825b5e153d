package devmapper

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/managerd/managerd/manager/thinpool"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// still runs fn while nothing is written to a device, if there is one and it is in use, so that a snapshot of it is whole.
func (b *Backend) still(name string, fn func() error) (err error) {
	if name == "" {
		return fn()
	}
	b.suspending.Lock()
	defer b.suspending.Unlock()
	is, err := thinpool.Active(name)
	if err != nil {
		return err
	}
	if !is {
		return fn()
	}
	if err := thinpool.Suspend(name); err != nil {
		return err
	}
	failpoint.Hit("devmapper.create.suspended")
	defer func() { err = errors.Join(err, thinpool.Resume(name)) }()
	return fn()
}

// recover puts right what a daemon has left that was killed: a suspended device, and records that were being written.
func (b *Backend) recover(root string) error {
	written, err := filepath.Glob(filepath.Join(root, recording+"*"))
	if err != nil {
		return err
	}
	for _, path := range written {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	broken, err := b.Broken()
	if err != nil {
		return err
	}
	for id, how := range broken {
		slog.Warn("a device is resumed", "device", b.name(id), "problem", how)
		if err := b.Mend(id); err != nil {
			slog.Error("a device stays suspended", "error", err)
		}
	}
	return nil
}

// Broken finds the devices that are suspended, see snapshots.Mender.
func (b *Backend) Broken() (map[uint64]string, error) {
	b.suspending.Lock()
	defer b.suspending.Unlock()
	out := map[uint64]string{}
	err := b.dirs.Notes(func(id uint64, _ []byte) error {
		_, suspended, err := thinpool.Seen(b.name(id))
		if suspended {
			out[id] = fmt.Sprintf("its device %s is suspended: whoever writes to it waits", b.name(id))
		}
		return err
	})
	return out, err
}

// Mend resumes a device.
func (b *Backend) Mend(id uint64) error { return thinpool.Resume(b.name(id)) }
