//go:build cgo && seccomp

package filter

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"

	"github.com/managerd/managerd/reaper"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Verb {
		Main()
	}
	os.Exit(m.Run())
}

func newCache(t *testing.T) *Cache {
	t.Helper()
	r, err := reaper.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return &Cache{Dir: filepath.Join(t.TempDir(), "a", "b"), Reaper: r}
}

func newProfile(t *testing.T, calls ...string) *Profile {
	t.Helper()
	config := &configs.Seccomp{DefaultAction: configs.Allow}
	for _, c := range calls {
		config.Syscalls = append(config.Syscalls, &configs.Syscall{Name: c, Action: configs.Errno})
	}
	p, err := NewProfile(config)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// open gives what is in the file that c has for p, nil for no file.
func open(t *testing.T, c *Cache, p *Profile) []byte {
	t.Helper()
	f, err := c.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	if f == nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt([]byte{0}, 0); err == nil {
		t.Error("what was handed over can be written to")
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, st.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		t.Fatal(err)
	}
	return data
}

// TestCache: there is nothing before a Fill; many at once leave one filter; other profiles have others; a second Fill gives
// the same bytes.
func TestCache(t *testing.T) {
	c := newCache(t)
	one, two := newProfile(t, "mkdir", "mkdirat"), newProfile(t, "mkdir", "unlink")
	if data := open(t, c, one); data != nil {
		t.Errorf("%d bytes before anything was compiled", len(data))
	}
	var work sync.WaitGroup
	for range 8 {
		work.Go(func() {
			if err := c.Fill(one); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	first := open(t, c, one)
	if _, _, err := lengths(first, int64(len(first))); err != nil {
		t.Fatal(err)
	}
	if err := c.Fill(one); err != nil {
		t.Fatal(err)
	}
	if again := open(t, c, one); !bytes.Equal(first, again) {
		t.Errorf("the same profile gives %d bytes, and then %d others", len(first), len(again))
	}
	if err := c.Fill(two); err != nil {
		t.Fatal(err)
	}
	if other := open(t, c, two); bytes.Equal(first, other) || other == nil {
		t.Error("another profile has the same filter")
	}
	if all, _ := os.ReadDir(c.Dir); len(all) != 2 {
		t.Errorf("%d files in the directory", len(all))
	}
}

// TestCacheFails: a profile that cannot be compiled leaves nothing, and the error has the reason.
func TestCacheFails(t *testing.T) {
	c := newCache(t)
	err := c.Fill(&Profile{name: "broken", config: []byte(`{"default_action":`)})
	if err == nil || !strings.Contains(err.Error(), "cannot read a seccomp profile") {
		t.Errorf("%v", err)
	}
	bad, perr := NewProfile(&configs.Seccomp{DefaultAction: 99})
	if perr != nil {
		t.Fatal(perr)
	}
	if err := c.Fill(bad); err == nil || !strings.Contains(err.Error(), "invalid default action") {
		t.Errorf("%v", err)
	}
	if all, _ := os.ReadDir(c.Dir); len(all) != 0 {
		t.Errorf("%v is left behind", all)
	}
}

// TestCacheNone: no cache, or no profile, is no error.
func TestCacheNone(t *testing.T) {
	var none *Cache
	if f, err := none.Open(newProfile(t, "mkdir")); f != nil || err != nil {
		t.Errorf("%v, %v", f, err)
	}
	p, err := NewProfile(nil)
	if p != nil || err != nil {
		t.Errorf("%v, %v", p, err)
	}
	if err := newCache(t).Fill(p); err != nil {
		t.Error(err)
	}
}

// TestCacheUnfinished: what a shim left half done keeps nobody from compiling for long; what another is at is left to it.
func TestCacheUnfinished(t *testing.T) {
	c, p := newCache(t), newProfile(t, "mkdir")
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(c.Dir, p.name+".new")
	if err := os.WriteFile(half, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Fill(p); err != nil || open(t, c, p) != nil {
		t.Errorf("it was compiled beside another: %v", err)
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(half, old, old); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Fill(p), c.Fill(p)); err != nil || open(t, c, p) == nil {
		t.Errorf("it was not compiled: %v", err)
	}
}

// TestCachePrivate: a directory in which others may write, or that is none, is not used, and stays as it is.
func TestCachePrivate(t *testing.T) {
	for name, make := range map[string]func(dir string) error{
		"mode":  func(dir string) error { return os.Mkdir(dir, 0o750) },
		"owner": func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 1000, 0)) },
		"link": func(dir string) error {
			return errors.Join(os.Mkdir(dir+"2", 0o700), os.Symlink(dir+"2", dir))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := newCache(t), newProfile(t, "mkdir")
			c.Dir = filepath.Join(t.TempDir(), "dir")
			if err := make(c.Dir); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Open(p); err == nil || !strings.Contains(err.Error(), c.Dir+" is not used") {
				t.Errorf("opened: %v", err)
			}
			if err := c.Fill(p); err == nil || !strings.Contains(err.Error(), c.Dir+" is not used") {
				t.Errorf("filled: %v", err)
			}
			if all, _ := os.ReadDir(c.Dir); len(all) != 0 {
				t.Errorf("%v was put there", all)
			}
		})
	}
}

// TestCachePrunes: there are never many more filters than are kept, and the newest stay.
func TestCachePrunes(t *testing.T) {
	c, p := newCache(t), newProfile(t, "mkdir")
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range kept + 9 {
		name := filepath.Join(c.Dir, fmt.Sprint(i))
		when := time.Now().Add(time.Duration(i-1000) * time.Hour)
		if err := errors.Join(os.WriteFile(name, nil, 0o600), os.Chtimes(name, when, when)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Fill(p); err != nil {
		t.Fatal(err)
	}
	if all, _ := os.ReadDir(c.Dir); len(all) != kept {
		t.Errorf("%d files are there", len(all))
	}
	if open(t, c, p) == nil {
		t.Error("the new one is not there")
	}
	if _, err := os.Stat(filepath.Join(c.Dir, "9")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the oldest is there: %v", err)
	}
}
