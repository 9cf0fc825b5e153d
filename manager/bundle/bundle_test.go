package bundle

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

func store(t *testing.T) *Store {
	t.Helper()
	s, err := NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	found, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range found {
		out = append(out, e.Name())
	}
	return out
}

func TestLife(t *testing.T) {
	s := store(t)
	b, err := s.Create("ns", "c1", []byte(`{"ociVersion":"1.0.0"}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]fs.FileMode{
		".": fs.ModeDir | 0o711, shimapi.RootfsDir: fs.ModeDir | 0o711, shimapi.ConfigFile: 0o600, shimapi.LogFIFO: fs.ModeNamedPipe | 0o600,
	} {
		fi, err := os.Lstat(filepath.Join(b.Path, name))
		if err != nil || fi.Mode() != mode {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}
	if _, err := s.Create("ns", "c1", []byte("{}")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second of the same id: %v", err)
	}
	if _, err := s.Create("other", "c1", []byte("{}")); err != nil {
		t.Errorf("same id in another namespace: %v", err)
	}
	if got, err := s.Load("ns", "c1"); err != nil || *got != *b {
		t.Errorf("load: %v, %v", got, err)
	}
	if _, err := s.Load("ns", "c2"); !errdefs.IsNotFound(err) {
		t.Errorf("load of none: %v", err)
	}
	if err := os.WriteFile(filepath.Join(s.root, "stray"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err := s.List(); err != nil || len(all) != 2 {
		t.Errorf("list: %v, %v", all, err)
	}
	for range 2 {
		if err := b.Remove(); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	if left := entries(t, filepath.Join(s.root, "ns")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestMalformedSpec(t *testing.T) {
	s := store(t)
	for _, spec := range []string{"", "{", `{"a":1,}`, "\x00"} {
		if _, err := s.Create("ns", "c1", []byte(spec)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", spec, err)
		}
	}
	if _, err := os.Stat(filepath.Join(s.root, "ns")); err == nil {
		t.Error("something was made")
	}
}

// TestHalf: what a killed daemon left half made or half removed is cleared away, also when something is mounted in it.
func TestHalf(t *testing.T) {
	state := t.TempDir()
	dir := filepath.Join(state, Dir, "ns")
	for _, name := range []string{newPrefix + "c1", oldPrefix + "c-2", "kept"} {
		rootfs := filepath.Join(dir, name, shimapi.RootfsDir)
		if err := os.MkdirAll(rootfs, 0o755); err != nil {
			t.Fatal(err)
		}
		if name == "kept" {
			continue
		}
		if err := unix.Mount("tmpfs", rootfs, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	s, err := NewStore(state)
	if err != nil {
		t.Fatal(err)
	}
	if left := entries(t, dir); len(left) != 1 || left[0] != "kept" {
		t.Errorf("left: %v", left)
	}
	// One that is being made when another attempt of the same daemon failed does not stand in the way.
	if err := os.Mkdir(filepath.Join(dir, newPrefix+"c1"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, oldPrefix+"c1", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	b, err := s.Create("ns", "c1", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(); err != nil {
		t.Error(err)
	}
}

// TestRemoveMounted: what lies below a mount is not ours to remove.
func TestRemoveMounted(t *testing.T) {
	s := store(t)
	b, err := s.Create("ns", "c1", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	precious := t.TempDir()
	if err := os.WriteFile(filepath.Join(precious, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(precious, filepath.Join(b.Path, shimapi.RootfsDir), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(precious, "file")); err != nil {
		t.Error(err)
	}
}

func TestConcurrentCreate(t *testing.T) {
	s := store(t)
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := s.Create("ns", "c1", []byte("{}")); err == nil {
				won.Add(1)
			}
		}()
	}
	wg.Wait()
	if won.Load() > 1 {
		t.Errorf("%d won", won.Load())
	}
}

func TestShimAndCursor(t *testing.T) {
	b, err := store(t).Create("ns", "c1", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Shim(); !errdefs.IsNotFound(err) {
		t.Errorf("no shim yet: %v", err)
	}
	want := shimapi.BootstrapParams{Version: 3, Address: "unix:///x", Protocol: "ttrpc"}
	if err := b.SetShim("/bin/shim", want); err != nil {
		t.Fatal(err)
	}
	if bin, p, err := b.Shim(); err != nil || bin != "/bin/shim" || p != want {
		t.Errorf("%q, %v, %v", bin, p, err)
	}
	for _, damaged := range []string{"", "{", "not an address"} {
		if err := b.write(shimapi.BootstrapFile, []byte(damaged)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.Shim(); !errdefs.IsDataLoss(err) {
			t.Errorf("bootstrap file %q: %v", damaged, err)
		}
	}
	if b.Cursor() != 0 {
		t.Error("cursor of a new bundle")
	}
	for _, seq := range []uint64{1, 1 << 40, 3} {
		if err := b.SetCursor(seq); err != nil || b.Cursor() != seq {
			t.Errorf("cursor %d: %d, %v", seq, b.Cursor(), err)
		}
	}
	if err := b.write(cursorFile, []byte("short")); err != nil || b.Cursor() != 0 {
		t.Errorf("damaged cursor: %d, %v", b.Cursor(), err)
	}
	if r, err := b.Ledger(); err != nil || r != nil {
		t.Errorf("no ledger: %v, %v", r, err)
	}
	if err := b.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := b.SetCursor(1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("cursor of a removed bundle: %v", err)
	}
}

func TestInit(t *testing.T) {
	b, err := store(t).Create("ns", "c1", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	cmd.Dir = b.Path
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	pid := uint32(cmd.Process.Pid)
	path := b.file(shimapi.InitPidFile)
	for content, want := range map[string]uint32{"": 0, "x": 0, "-4": 0, "999999999": 0, strconv.Itoa(int(pid)) + "\n": pid} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, _ := b.Init(); got != want {
			t.Errorf("%q: %d", content, got)
		}
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(int(pid))), 0o600); err != nil {
		t.Fatal(err)
	}
	_, ticks := b.Init()
	if !InitAlive(pid, ticks) || InitAlive(pid, 0) || InitAlive(pid, ticks+1) {
		t.Error("the process lives, and began when it began")
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if got, _ := b.Init(); got != 0 {
		t.Error("the process is younger than the file that names it")
	}
	if err := SignalInit(pid, ticks+1, unix.SIGKILL); !errdefs.IsNotFound(err) {
		t.Errorf("signal to another process: %v", err)
	}
	if err := SignalInit(pid, ticks, 0); err != nil {
		t.Errorf("signal: %v", err)
	}
	if err := b.KillShim(uint32(os.Getpid())); !errdefs.IsNotFound(err) {
		t.Errorf("kill of a process that is no shim of this bundle: %v", err)
	}
	if err := b.KillShim(pid); err != nil {
		t.Errorf("kill: %v", err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("not killed")
	}
	if err := b.KillShim(pid); !errdefs.IsNotFound(err) {
		t.Errorf("kill of a dead one: %v", err)
	}
	if InitAlive(pid, ticks) {
		t.Error("it is dead")
	}
}

// TestKeepsByAnyThread: a process works in the bundle also when its first thread works elsewhere.
func TestKeepsByAnyThread(t *testing.T) {
	store, err := NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b, err := store.Create("ns", "one", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	pid := uint32(os.Getpid())
	if b.Keeps(pid) {
		t.Error("no thread works there")
	}
	moved, done := make(chan error), make(chan struct{})
	defer close(done)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine, or rests for ever if it is the first
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = os.Chdir(b.Path)
		}
		moved <- err
		<-done
	}()
	if err := <-moved; err != nil {
		t.Fatal(err)
	}
	if !b.Keeps(pid) {
		t.Error("a thread works there")
	}
}
