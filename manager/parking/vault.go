package parking

import (
	"cmp"
	"errors"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/parking"
)

// Vault keeps descriptors beyond the life of this process, by name: the service manager's file descriptor store.
type Vault interface {
	// Kept gives those that an earlier process left; they become the caller's, their names are those of the files. Asked once.
	Kept() []*os.File
	// Keep keeps a copy of f.
	Keep(name string, f *os.File) error
	// Release closes what was kept as name, if anything was.
	Release(name string) error
}

const (
	// VaultPrefix begins the names of what a lot keeps in a vault: "park-" and a number in base 36. They are short: the
	// service manager passes all of them in one variable, which may have 128 KiB.
	VaultPrefix = "park-"
	// rest is how long after a change the vault has it, so that what lives shorter is never there.
	rest = 20 * time.Millisecond
	// vaultRetry is how long a vault that takes nothing is left alone.
	vaultRetry = time.Second
)

// process is one of a task, whose descriptors are one parcel in the vault. A parcel is a socket with the message unread in
// it (unix(7)): it needs nothing else to be understood, and the descriptors in it stay open as long as the socket does.
type process struct {
	task
	exec string
}

// keeping keeps what is parked in a vault too.
type keeping struct {
	vault Vault
	log   *slog.Logger
	wake  chan struct{} // has room for one
	end   chan struct{}
	once  sync.Once // closes end
	work  sync.WaitGroup

	mu    sync.Mutex // the lot's is taken before it, or not at all
	dirty map[process]bool

	// What is in the vault; run's own, once it runs.
	names map[process]string
	stale []string // to be released
	next  uint64
}

// restore fills the lot with what the vault has of an earlier daemon. Nothing is served yet.
func (l *Lot) restore(v Vault) {
	k := &keeping{
		vault: v, log: l.log, wake: make(chan struct{}, 1), end: make(chan struct{}), dirty: map[process]bool{}, names: map[process]string{},
	}
	l.keeping = k
	kept := v.Kept()
	number := func(f *os.File) uint64 {
		n, err := strconv.ParseUint(strings.TrimPrefix(f.Name(), VaultPrefix), 36, 64)
		if err != nil {
			return 0
		}
		return n
	}
	slices.SortFunc(kept, func(a, b *os.File) int { return cmp.Compare(number(a), number(b)) }) // the newest of a process counts
	for _, f := range kept {
		k.next = max(k.next, number(f))
		p, files, err := peek(f)
		_ = f.Close()
		failpoint.Hit("parking.vault.looked")
		if err != nil {
			l.log.Error("what an earlier daemon had kept cannot be read", "name", f.Name(), "error", err)
			k.stale = append(k.stale, f.Name())
			continue
		}
		of := process{task{p.Namespace, p.ContainerId}, p.ExecId}
		if older := k.names[of]; older != "" {
			k.stale = append(k.stale, older)
			l.forget(of)
		}
		k.names[of] = f.Name()
		l.take(p, files, map[name]bool{})
	}
	clear(k.dirty) // it is there
	k.poke()
	k.work.Go(func() { k.run(l) })
}

// forget closes what is parked of a process.
func (l *Lot) forget(of process) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n, f := range l.held[of.task] {
		if n.exec == of.exec {
			_ = f.Close()
			delete(l.held[of.task], n)
		}
	}
}

// changedLocked says that the vault has to be told of a process.
func (l *Lot) changedLocked(of process) {
	k := l.keeping
	if k == nil {
		return
	}
	k.mu.Lock()
	k.dirty[of] = true
	k.mu.Unlock()
	k.poke()
}

func (k *keeping) poke() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// run keeps the vault up to date until end, and then once more.
func (k *keeping) run(l *Lot) {
	for wait := rest; ; {
		select {
		case <-k.wake:
		case <-k.end:
		}
		select {
		case <-time.After(wait):
		case <-k.end:
			if err := k.update(l); err != nil {
				k.log.Warn("the service manager may not have everything that must outlive this daemon", "error", err)
			}
			return
		}
		err := k.update(l)
		if err != nil && wait == rest {
			k.log.Warn("the service manager does not keep what must outlive this daemon, trying again", "error", err)
		}
		if wait = rest; err != nil {
			wait = vaultRetry
			k.poke()
		}
	}
}

// update brings the vault up to date. After an error the rest is still to be done.
func (k *keeping) update(l *Lot) (err error) {
	k.mu.Lock()
	dirty := k.dirty
	k.dirty = map[process]bool{}
	k.mu.Unlock()
	defer func() {
		if err != nil {
			k.mu.Lock()
			defer k.mu.Unlock()
			maps.Copy(k.dirty, dirty)
		}
	}()
	for of := range dirty {
		if err := k.store(l, of); err != nil {
			return err
		}
		delete(dirty, of)
	}
	for len(k.stale) > 0 {
		if err := k.vault.Release(k.stale[0]); err != nil {
			return err
		}
		failpoint.Hit("parking.vault.released")
		k.stale = k.stale[1:]
	}
	return nil
}

// store puts what is parked of a process into the vault, and marks what that has of it as stale.
func (k *keeping) store(l *Lot, of process) error {
	f, err := l.parcel(of)
	if err != nil {
		k.log.Error("cannot make a parcel for the service manager", "namespace", of.ns, "id", of.id, "exec", of.exec, "error", err)
		return nil // the next one may
	}
	older := k.names[of]
	if f == nil {
		delete(k.names, of)
	} else {
		k.next++
		n := VaultPrefix + strconv.FormatUint(k.next, 36)
		failpoint.Hit("parking.vault.made")
		err := k.vault.Keep(n, f)
		_ = f.Close()
		if err != nil {
			return err
		}
		failpoint.Hit("parking.vault.kept")
		k.names[of] = n
	}
	if older != "" {
		k.stale = append(k.stale, older)
	}
	return nil
}

// parcel makes a socket with all that is parked of a process unread in it; nil for nothing.
func (l *Lot) parcel(of process) (*os.File, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &shimstate.Parcel{Namespace: of.ns, ContainerId: of.id, ExecId: of.exec}
	var files []*os.File
	for n, f := range l.held[of.task] {
		if n.exec == of.exec {
			p.Kinds = append(p.Kinds, n.kind)
			files = append(files, f)
		}
	}
	if len(files) == 0 {
		return nil, nil
	}
	ours, theirs, err := parking.Pair()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(parking.Send(ours, p, files), ours.Close()); err != nil {
		_ = theirs.Close()
		return nil, err
	}
	return theirs, nil
}

// peek reads the parcel of a socket and leaves it there: the service manager's copy is the same socket.
func peek(f *os.File) (*shimstate.Parcel, []*os.File, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var p *shimstate.Parcel
	var files []*os.File
	cerr := rc.Control(func(fd uintptr) { p, files, err = parking.Peek(int(fd)) })
	if err := errors.Join(cerr, err); err != nil {
		return nil, nil, err
	}
	return p, files, nil
}

// same says whether both are the same open file, so that neither need take the other's place.
func same(a, b *os.File) (is bool) {
	ra, erra := a.SyscallConn()
	rb, errb := b.SyscallConn()
	if erra != nil || errb != nil {
		return false
	}
	pid := uintptr(os.Getpid())
	_ = ra.Control(func(fa uintptr) {
		_ = rb.Control(func(fb uintptr) {
			const file = 0                                                         // KCMP_FILE
			r, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, file, fa, fb, 0) // kcmp(2)
			is = errno == 0 && r == 0
		})
	})
	return is
}

// Only drops everything that is parked of tasks that are not known, left over from an earlier daemon.
func (l *Lot) Only(known func(ns, id string) bool) {
	l.mu.Lock()
	var gone []task
	for t := range l.held {
		if !known(t.ns, t.id) {
			gone = append(gone, t)
		}
	}
	l.mu.Unlock()
	for _, t := range gone {
		l.log.Info("dropping what was parked of a task that is gone", "namespace", t.ns, "id", t.id)
		l.Drop(t.ns, t.id)
	}
}
