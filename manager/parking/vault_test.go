package parking

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi/parking"
)

// vault is one in memory.
type vault struct {
	t      *testing.T
	mu     sync.Mutex
	files  map[string]*os.File
	kept   int // how often something was
	broken error
}

func newVault(t *testing.T) *vault {
	v := &vault{t: t, files: map[string]*os.File{}}
	t.Cleanup(func() {
		for _, f := range v.files {
			_ = f.Close()
		}
	})
	return v
}

func (v *vault) copy(name string, f *os.File) *os.File {
	rc, err := f.SyscallConn()
	if err != nil {
		v.t.Fatal(err)
	}
	var n int
	if cerr := rc.Control(func(fd uintptr) { n, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil || err != nil {
		v.t.Fatal(cerr, err)
	}
	return os.NewFile(uintptr(n), name)
}

func (v *vault) Kept() (all []*os.File) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for name, f := range v.files { // in any order
		all = append(all, v.copy(name, f))
	}
	return all
}

func (v *vault) Keep(name string, f *os.File) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.broken != nil {
		return v.broken
	}
	if v.files[name] != nil {
		v.t.Errorf("two are named %s", name)
	}
	v.files[name] = v.copy(name, f)
	v.kept++
	return nil
}

func (v *vault) Release(name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.broken != nil {
		return v.broken
	}
	if f := v.files[name]; f != nil {
		_ = f.Close()
		delete(v.files, name)
	}
	return nil
}

func (v *vault) names() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Sorted(maps.Keys(v.files))
}

func (v *vault) fail(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.broken = err
}

// await waits until the vault has n parcels.
func (v *vault) await(n int) []string {
	v.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		names := v.names()
		if len(names) == n {
			return names
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("the vault has %q, not %d", names, n)
		}
	}
}

func with(t *testing.T, v *vault) *Lot {
	t.Helper()
	l, err := Open(filepath.Join(t.TempDir(), parking.SocketName), v, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// TestVault: what was parked is there for the next daemon, and the one after it, as it was last; the vault is left alone as
// long as nothing changes, and empty in the end.
func TestVault(t *testing.T) {
	v := newVault(t)
	l := with(t, v)
	c := shim(t, l)
	park(t, c, &shimstate.Parcel{Kinds: []string{parking.Pidfd, parking.Terminal}}, "p1", "t1")
	park(t, c, &shimstate.Parcel{ExecId: "e", Kinds: []string{parking.Pidfd}}, "pe")
	v.await(2)
	f := file(t, "t2") // this one the shim sends again
	if err := parking.Send(c, &shimstate.Parcel{Namespace: "ns", ContainerId: "c", Kinds: []string{parking.Terminal}}, []*os.File{f}); err != nil {
		t.Fatal(err)
	}
	want := []string{"/pidfd=p1", "/terminal=t2", "e/pidfd=pe"}
	_ = c.Close()
	expect(t, handed(t, l, "c"), want...)
	var names []string
	for range 3 {
		l.Close() // with what it has not told the vault yet
		left := v.names()
		if names != nil && !slices.Equal(left, names) {
			t.Errorf("the vault has %q, which was %q", left, names)
		}
		names = left
		l = with(t, v)
		expect(t, handed(t, l, "c"), want...)
	}
	c = shim(t, l)
	kept := v.kept
	if err := parking.Send(c, &shimstate.Parcel{Namespace: "ns", ContainerId: "c", Kinds: []string{parking.Terminal}}, []*os.File{f}); err != nil {
		t.Fatal(err)
	}
	park(t, c, &shimstate.Parcel{Whole: true})
	v.await(1) // the exec is gone, and so is the pidfd
	expect(t, handed(t, l, "c"), "/terminal=t2")
	l.Only(func(ns, id string) bool { return ns == "ns" && id == "c" })
	v.await(1)
	l.Close()
	if v.kept != kept+1 {
		t.Errorf("the vault was given %d parcels for one that changed", v.kept-kept)
	}
	l = with(t, v)
	expect(t, handed(t, l, "c"), "/terminal=t2")
	l.Only(func(string, string) bool { return false })
	expect(t, handed(t, l, "c"))
	v.await(0)
}

// TestVaultShort: what lives for a moment may be there or not, and is not there for long.
func TestVaultShort(t *testing.T) {
	v := newVault(t)
	l := with(t, v)
	c := shim(t, l)
	for i := range 200 {
		e := fmt.Sprint("e", i)
		park(t, c, &shimstate.Parcel{ExecId: e, Kinds: []string{parking.Pidfd}}, "p")
		park(t, c, &shimstate.Parcel{ExecId: e, Drop: []string{parking.Pidfd}})
	}
	park(t, c, &shimstate.Parcel{ExecId: "last", Kinds: []string{parking.Pidfd}}, "p")
	v.await(1)
}

// TestVaultBroken: one that takes nothing is tried again.
func TestVaultBroken(t *testing.T) {
	v := newVault(t)
	v.fail(errors.New("full"))
	l := with(t, v)
	c := shim(t, l)
	park(t, c, &shimstate.Parcel{Kinds: []string{parking.Pidfd}}, "p1")
	park(t, c, &shimstate.Parcel{ExecId: "e", Kinds: []string{parking.Pidfd}}, "pe")
	expectSoon(t, l, "/pidfd=p1", "e/pidfd=pe")
	time.Sleep(2 * rest) // so that it has been asked
	v.fail(nil)
	v.await(2)
	v.fail(errors.New("full"))
	l.Drop("ns", "c")
	time.Sleep(2 * rest)
	v.fail(nil)
	v.await(0)
}

// TestVaultOlder: of two parcels of one process, which a daemon leaves that is killed between them, the newer one counts;
// what is no parcel is thrown away.
func TestVaultOlder(t *testing.T) {
	v := newVault(t)
	l := with(t, v)
	c := shim(t, l)
	for _, n := range []string{"park-z", "park-10"} { // 35 and 36
		l.mu.Lock()
		l.held[task{"ns", "c"}] = map[name]*os.File{{"", parking.Terminal}: file(t, n)}
		l.mu.Unlock()
		f, err := l.parcel(process{task{"ns", "c"}, ""})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(v.Keep(n, f), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Keep("park-11", file(t, "no socket")); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	l.Close()
	l = with(t, v)
	expect(t, handed(t, l, "c"), "/terminal=park-10")
	if names := v.await(1); names[0] != "park-10" {
		t.Errorf("%q", names)
	}
	park(t, shim(t, l), &shimstate.Parcel{Kinds: []string{parking.Terminal}}, "new")
	expectSoon(t, l, "/terminal=new")
	l.Close()
	if names := v.await(1); names[0] != "park-12" {
		t.Errorf("%q", names)
	}
}

// expectSoon waits until the lot has received what was sent.
func expectSoon(t *testing.T, l *Lot, want ...string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !slices.Equal(handed(t, l, "c"), want); {
		if time.Now().After(deadline) {
			t.Fatalf("%q is not there", want)
		}
	}
}
