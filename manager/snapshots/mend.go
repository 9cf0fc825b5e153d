package snapshots

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/metadata"
)

// Mender is a Backend that can tell of storage that it is there and does not work, and put it right.
type Mender interface {
	// Broken says by ID what is wrong. Nothing that is right by itself in a moment is in it.
	Broken() (map[uint64]string, error)
	// Mend puts one right; nothing wrong with it is no error.
	Mend(id uint64) error
}

// Broken is a snapshot that is there and does not work.
type Broken struct {
	Stored
	Problem string
}

// Broken gives those of a snapshotter that have a record; nil for one that cannot tell.
func (s *Store) Broken(name string) ([]Broken, error) {
	st := s.find(name)
	if st == nil {
		return nil, nil
	}
	m, ok := st.backend.(Mender)
	if !ok {
		return nil, nil
	}
	problems, err := m.Broken()
	if err != nil || len(problems) == 0 {
		return nil, err
	}
	var all []found
	if err := s.db.View(func(tx *metadata.Tx) (err error) { all, err = st.all(tx); return err }); err != nil {
		return nil, err
	}
	var out []Broken
	for _, f := range all { // what has no record is Unknown
		if problem, is := problems[f.r.Id]; is {
			out = append(out, Broken{Stored{f.r.Id, f.ns, f.key}, problem})
		}
	}
	return out, nil
}

// Mend puts a snapshot right. NotImplemented where there is nothing that could be put right.
func (s *Store) Mend(name string, id uint64) error {
	st := s.find(name)
	if st == nil {
		return fmt.Errorf("snapshotter %q is not loaded: %w", name, errdefs.ErrFailedPrecondition)
	}
	m, ok := st.backend.(Mender)
	if !ok {
		return fmt.Errorf("%s snapshots are not mended: %w", name, errdefs.ErrNotImplemented)
	}
	return m.Mend(id)
}
