package blackbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func open(t *testing.T, path string) *Ring {
	t.Helper()
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func read(t *testing.T, path string) []Entry {
	t.Helper()
	entries, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// TestRing: the last Slots-1 entries are there, in order, while the writer has the file open, and a successor goes on.
func TestRing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "blackbox")
	r := open(t, path)
	if got := read(t, path); len(got) != 0 {
		t.Errorf("a new box has %v", got)
	}
	before := time.Now()
	r.Add(Answer, 3*time.Second, "Create")
	got := read(t, path)
	if len(got) != 1 || got[0].Number != 1 || got[0].Took != 3*time.Second || got[0].Text != "Create" || got[0].Kind != Answer ||
		got[0].PID != uint32(os.Getpid()) || got[0].Time.Before(before) || got[0].Time.After(time.Now()) {
		t.Errorf("got %+v", got)
	}
	for i := 2; i <= 1000; i++ {
		r.Add(Note, 0, fmt.Sprint(i))
	}
	got = read(t, path)
	if len(got) != Slots-1 || got[0].Number != 1000-Slots+2 || got[len(got)-1].Text != "1000" {
		t.Fatalf("%d entries, %+v to %+v", len(got), got[0], got[len(got)-1])
	}
	for i := 1; i < len(got); i++ {
		if got[i].Number != got[i-1].Number+1 || got[i].Text != fmt.Sprint(got[i].Number) {
			t.Errorf("%+v follows %+v", got[i], got[i-1])
		}
	}
	next := open(t, path) // the first never closed it: it was killed
	next.Add(Note, 0, strings.Repeat("x", 1000))
	got = read(t, path)
	if last := got[len(got)-1]; len(got) != Slots-1 || last.Number != 1001 || last.Text != strings.Repeat("x", MaxText) {
		t.Errorf("%d entries, the last is %+v", len(got), last)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != Size {
		t.Errorf("%v, %v", fi, err)
	}
}

// TestTorn: a slot that is damaged is passed over, the others are read; what is no box is refused, and made one anew.
func TestTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "blackbox")
	if _, err := Read(path); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	r := open(t, path)
	for i := range 5 {
		r.Add(Request, 0, fmt.Sprint(i))
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("torn"), 3*slotSize+headLen); err != nil { // entry 3
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	got := read(t, path)
	if len(got) != 4 || got[1].Number != 2 || got[2].Number != 4 {
		t.Errorf("got %+v", got)
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(other); !errdefs.IsDataLoss(err) {
		t.Error(err)
	}
	open(t, other).Add(Note, 0, "new")
	if got := read(t, other); len(got) != 1 || got[0].Text != "new" {
		t.Errorf("got %+v", got)
	}
}

// TestNone: a shim without a box, and one that has closed it, tell it in vain.
func TestNone(t *testing.T) {
	var none *Ring
	none.Add(Note, 0, "lost")
	if err := none.Close(); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "blackbox")
	r := open(t, path)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	r.Add(Note, 0, "lost")
	if got := read(t, path); len(got) != 0 {
		t.Errorf("got %v", got)
	}
	if _, err := Open(filepath.Join(t.TempDir(), "no", "where")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestFull: where there is no room there is no box, and no mapping whose use would kill.
func TestFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root: a small file system is mounted")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=32k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(dir, "blackbox")
	if _, err := Open(path); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if _, err := Read(path); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestAtOnce: many write, one reads; no entry is mixed up from two.
func TestAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "blackbox")
	r := open(t, path)
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for range 500 {
				r.Add(Event, 0, strings.Repeat(fmt.Sprint(w), 100))
			}
		})
	}
	for range 50 {
		for _, e := range read(t, path) {
			if e.Text != strings.Repeat(e.Text[:1], 100) {
				t.Errorf("mixed up: %q", e.Text)
			}
		}
	}
	writers.Wait()
	if got := read(t, path); len(got) != Slots-1 || got[len(got)-1].Number != 2000 {
		t.Errorf("%d entries", len(got))
	}
}

func FuzzParse(f *testing.F) {
	whole := make([]byte, Size)
	copy(whole, magic)
	encode(whole[slotSize:2*slotSize], Entry{Number: 1, Time: time.Unix(1, 0), Kind: Error, Text: "x"})
	f.Add(whole)
	f.Add([]byte("mgrbbox1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := parse(data)
		if err != nil && len(entries) > 0 {
			t.Errorf("%v, and %d entries", err, len(entries))
		}
		for _, e := range entries {
			if len(e.Text) > 3*MaxText || e.Number == 0 {
				t.Errorf("%+v", e)
			}
		}
	})
}

func BenchmarkAdd(b *testing.B) {
	r, err := Open(filepath.Join(b.TempDir(), "blackbox"))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	for b.Loop() {
		r.Add(Answer, time.Millisecond, "Start exec something signal 9")
	}
}
