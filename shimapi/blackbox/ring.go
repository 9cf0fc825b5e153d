package blackbox

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Ring writes a black box. A nil Ring drops what it is told: a shim lives without one. Its methods may be called by many
// goroutines at once; none of them waits for anything but the others.
type Ring struct {
	pid uint32

	mu   sync.Mutex
	data []byte // the mapping; nil once closed
	next uint64
}

// Open opens or makes the box at path. What an earlier shim wrote stays, until its slots are needed. The space is taken
// at once: writing to a mapping that finds none would be the end of the process. The caller closes the ring.
func Open(path string) (_ *Ring, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot open black box %s: %w", path, err)
		}
	}()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	next := uint64(1)
	if old, rerr := Read(path); rerr != nil { // it is new, or useless
		if err := f.Truncate(0); err != nil {
			return nil, err
		}
	} else if len(old) > 0 {
		next = old[len(old)-1].Number + 1
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, Size); err != nil {
		_ = os.Remove(path) // none is better than one that is no black box
		return nil, err
	}
	if err := f.Truncate(Size); err != nil {
		return nil, err
	}
	data, err := unix.Mmap(int(f.Fd()), 0, Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	copy(data, magic)
	return &Ring{pid: uint32(os.Getpid()), data: data, next: next}, nil
}

// Add writes an entry; text beyond MaxText bytes is cut off.
func (r *Ring) Add(kind Kind, took time.Duration, text string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.data == nil {
		return
	}
	at := (1 + (r.next-1)%(Slots-1)) * slotSize
	encode(r.data[at:at+slotSize], Entry{Number: r.next, Time: time.Now(), Took: took, PID: r.pid, Kind: kind, Text: text})
	r.next++
}

// Close lets go of the file. What is added later is dropped.
func (r *Ring) Close() error {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	data := r.data
	r.data = nil
	if data == nil {
		return nil
	}
	if err := unix.Munmap(data); err != nil {
		return fmt.Errorf("cannot close black box: %w", err)
	}
	return nil
}
