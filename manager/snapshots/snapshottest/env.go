// Package snapshottest is what every storage of snapshots must do, as a test: mounted, and seen through the store.
package snapshottest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/shimapi/mount"
)

// Name is what the backend under test is called.
const Name = "tested"

// Env is one store with the backend under test.
type Env struct {
	T      *testing.T
	Column Column
	Root   string          // of the backend
	Ctx    context.Context // has a namespace
	DB     *metadata.DB
	Store  *snapshots.Store
	S      snapshots.Snapshotter
	Events *Events
}

// Events keeps what was published.
type Events struct {
	mu     sync.Mutex
	topics []string
}

// Publish implements snapshots.Publisher.
func (e *Events) Publish(ctx context.Context, topic string, event proto.Message) error {
	if _, err := namespaces.Required(ctx); err != nil { // as the true one
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.topics = append(e.topics, fmt.Sprintf("%s %s", topic, event.ProtoReflect().Get(event.ProtoReflect().Descriptor().Fields().ByName("key"))))
	return nil
}

func (e *Events) take() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.topics
	e.topics = nil
	return t
}

// Open makes a store in dir, or opens the one that is there. It is closed when the test ends, or by calling stop.
func Open(t *testing.T, dir string, backend func(root string) (snapshots.Backend, error)) (e *Env, stop func()) {
	t.Helper()
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := backend(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	e = &Env{T: t, Root: filepath.Join(dir, "root"), Ctx: namespaces.With(context.Background(), "one"), DB: db, Events: &Events{}}
	if e.Store, err = snapshots.NewStore(e.Ctx, db, e.Events, map[string]snapshots.Backend{Name: b}); err != nil {
		t.Fatal(err)
	}
	if e.S, err = e.Store.Snapshotter(Name); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		if err := errors.Join(e.Store.Close(), db.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return e, stop
}

// Column is one snapshotter in the table of the suite.
type Column struct {
	Name string
	// Open opens the storage below root, anew or again.
	Open func(root string) (snapshots.Backend, error)
	// Stored lists what storage there is, by ID.
	Stored func(root string) ([]string, error)
	// Setup makes the directory in which roots are made; nil: any will do. It skips the test where the machine cannot.
	Setup func(t *testing.T) string
	// Where is "" for everywhere, else what runs it.
	Where string
	// Must says that a machine that cannot fails the test.
	Must bool
	// Blocks says that usage counts the blocks of a file system, with what that needs for itself.
	Blocks bool
	// Repacks says that a commit packs what is stored anew.
	Repacks bool
	// Foreign says that the storage is another program's, in which a commit is over at once, recorded or not.
	Foreign bool
	// Keeps says that layers stay mounted below the root as long as they are stored.
	Keeps bool
}

// Dir is a directory for one test.
func (c Column) Dir(t *testing.T) string {
	if c.Must {
		t.Cleanup(func() {
			if t.Skipped() {
				t.Error("it must not be skipped here")
			}
		})
	}
	if c.Setup != nil {
		return c.Setup(t)
	}
	return t.TempDir()
}

// Kept is a temporary directory for storage that stays mounted: what is left of that at the end of the test is unmounted.
func Kept(t *testing.T) string {
	dir := t.TempDir()
	Unmounted(t, dir)
	return dir
}

// Unmounted unmounts what is left below dir at the end of the test.
func Unmounted(t *testing.T, dir string) {
	t.Cleanup(func() {
		unmountBelow(t, dir)
		NoLoops(t, dir)
	})
}

func unmountBelow(t *testing.T, dir string) {
	for _, line := range slices.Backward(mountsOf(t, dir)) {
		if at := strings.Fields(line)[4]; strings.HasPrefix(at, dir+"/") {
			if err := mount.Unmount(at); err != nil {
				t.Error(err)
			}
		}
	}
}

// mountsOf lists the mounts whose line names something below dir: the temporary directories of one test have one parent.
func mountsOf(t *testing.T, dir string) (lines []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, dir+"/") {
			lines = append(lines, line)
		}
	}
	return lines
}

// Must fails the test on an error.
func (e *Env) Must(err error) {
	e.T.Helper()
	if err != nil {
		e.T.Fatal(err)
	}
}

// Is fails the test when err is not of that kind.
func (e *Env) Is(err, want error) {
	e.T.Helper()
	if !errors.Is(err, want) {
		e.T.Errorf("error is %v, want %v", err, want)
	}
}

// Prepare makes an active snapshot, runs fn on its mounted root, and commits it as name.
func (e *Env) Prepare(name, parent string, fn func(root string)) {
	e.T.Helper()
	m, err := e.S.Prepare(e.Ctx, name+"-active", parent, nil)
	e.Must(err)
	e.On(m, fn)
	e.Must(e.S.Commit(e.Ctx, name, name+"-active", nil))
}

// On mounts for the time of fn.
func (e *Env) On(m []*types.Mount, fn func(root string)) {
	e.T.Helper()
	target := e.T.TempDir()
	e.Must(mount.Mount(m, target))
	defer func() { e.Must(mount.Unmount(target)) }()
	fn(target)
}

func (e *Env) write(root, name, body string) {
	e.T.Helper()
	e.Must(os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755))
	e.Must(os.WriteFile(filepath.Join(root, name), []byte(body), 0o644))
}

func (e *Env) has(root, name, body string) {
	e.T.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil || string(b) != body {
		e.T.Errorf("%s is %q (%v), want %q", name, b, err, body)
	}
}

func (e *Env) hasNot(root, name string) {
	e.T.Helper()
	if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, os.ErrNotExist) {
		e.T.Errorf("%s is there (%v)", name, err)
	}
}
