// Package bundle owns the bundle directories, one per task, below STATE/io.containerd.runtime.v2.task/NAMESPACE/ID. It is
// the only one in the daemon that knows what stands in them (shimapi names what the shim shares). They die with the boot.
package bundle

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/ledger"
	"github.com/managerd/managerd/shimapi/mount"
)

// Dir is the directory of all bundles below the daemon's state directory.
const Dir = "io.containerd.runtime.v2.task"

// SandboxDir is that of all bundles of sandboxes.
const SandboxDir = "io.containerd.sandbox.controller.v1.shim"

const (
	cursorFile = shimapi.CursorFile // and behind the number the bundle's random name
	binaryFile = "shim-binary-path" // of the shim that was spawned, as containerd keeps it
	madeFile   = "made"             // see SetMade
	recordFile = "container"        // what the daemon noted of the container, see SetRecord
	doomedFile = "doomed"           // the task is to be removed as soon as its processes have ended
	newPrefix  = ".new-"            // a bundle that is being made; ids never begin with a dot
	oldPrefix  = ".old-"            // one that is being removed
)

// What stands in cursorFile, in bytes.
const cursorLen, nameLen = 8, 16

// Store is the directory of all bundles.
type Store struct {
	root    string
	sandbox bool
}

// Bundle is one task's directory, or one sandbox's.
type Bundle struct {
	Namespace, ID string
	Path          string // absolute
	Sandbox       bool
}

// NewStore uses state, the daemon's state directory, which need not exist. It removes what an earlier daemon left half made or half removed.
func NewStore(state string) (*Store, error) { return newStore(&Store{root: filepath.Join(state, Dir)}) }

// NewSandboxStore is NewStore for the bundles of sandboxes.
func NewSandboxStore(state string) (*Store, error) {
	return newStore(&Store{root: filepath.Join(state, SandboxDir), sandbox: true})
}

func newStore(s *Store) (*Store, error) {
	if err := os.MkdirAll(s.root, 0o711); err != nil {
		return nil, fmt.Errorf("cannot make bundle directory: %w", err)
	}
	half, err := filepath.Glob(filepath.Join(s.root, "*", ".*-*"))
	if err != nil {
		return nil, err
	}
	for _, path := range half {
		if err := remove(path); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// ExistingSandboxes is Existing for the bundles of sandboxes.
func ExistingSandboxes(state string) *Store {
	return &Store{root: filepath.Join(state, SandboxDir), sandbox: true}
}

// Existing gives the bundles below state for somebody who is not the daemon: it makes and removes nothing, and state need not
// exist.
func Existing(state string) *Store { return &Store{root: filepath.Join(state, Dir)} }

// State is the daemon's state directory.
func (s *Store) State() string { return filepath.Dir(s.root) }

// Create makes the bundle of a task, with spec, JSON of the OCI runtime spec, as its config. It is there whole or not at
// all. A sandbox may have none (nil). InvalidArgument for malformed JSON, AlreadyExists when there is one.
func (s *Store) Create(ns, id string, spec []byte) (_ *Bundle, err error) {
	if !json.Valid(spec) && !(s.sandbox && spec == nil) {
		var v any
		return nil, fmt.Errorf("spec of container %s is malformed JSON: %w: %w", id, json.Unmarshal(spec, &v), errdefs.ErrInvalidArgument)
	}
	dir := filepath.Join(s.root, ns)
	if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	b := s.at(ns, id)
	half := filepath.Join(dir, newPrefix+id)
	if err := remove(half); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = remove(half)
			err = fmt.Errorf("cannot make bundle %s: %w", b.Path, err)
		}
	}()
	if err := os.Mkdir(half, 0o711); err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(half, shimapi.RootfsDir), 0o711); err != nil {
		return nil, err
	}
	if spec != nil {
		if err := os.WriteFile(filepath.Join(half, shimapi.ConfigFile), spec, 0o600); err != nil {
			return nil, err
		}
	}
	if err := unix.Mkfifo(filepath.Join(half, shimapi.LogFIFO), 0o600); err != nil {
		return nil, err
	}
	cursor := make([]byte, cursorLen+nameLen) // the first event has number 1
	_, _ = rand.Read(cursor[cursorLen:])      // never fails
	if err := os.WriteFile(filepath.Join(half, cursorFile), cursor, 0o600); err != nil {
		return nil, err
	}
	failpoint.Hit("bundle.create.half")
	err = unix.Renameat2(unix.AT_FDCWD, half, unix.AT_FDCWD, b.Path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	}
	return b, err
}

func (s *Store) at(ns, id string) *Bundle {
	return &Bundle{Namespace: ns, ID: id, Path: filepath.Join(s.root, ns, id), Sandbox: s.sandbox}
}

// Label names in errors whose bundle it is.
func (b *Bundle) Label() string {
	if b.Sandbox {
		return "sandbox " + b.ID
	}
	return "task " + b.ID
}

// Load finds the bundle of a task. NotFound when there is none.
func (s *Store) Load(ns, id string) (*Bundle, error) {
	b := s.at(ns, id)
	fi, err := os.Stat(b.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s has no bundle: %w", b.Label(), errdefs.ErrNotFound)
	case err != nil:
		return nil, err
	case !fi.IsDir():
		return nil, fmt.Errorf("bundle %s is not a directory: %w", b.Path, errdefs.ErrDataLoss)
	}
	return b, nil
}

// List gives every bundle of every namespace.
func (s *Store) List() ([]*Bundle, error) {
	var out []*Bundle
	spaces, err := os.ReadDir(s.root)
	if err != nil {
		return nil, fmt.Errorf("cannot list bundles: %w", err)
	}
	for _, ns := range spaces {
		if !ns.IsDir() {
			continue
		}
		entries, err := os.ReadDir(filepath.Join(s.root, ns.Name()))
		if err != nil {
			return nil, fmt.Errorf("cannot list bundles: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
				out = append(out, s.at(ns.Name(), e.Name()))
			}
		}
	}
	return out, nil
}

// Remove unmounts what is mounted in the bundle and removes it. A bundle that is not there is no error.
func (b *Bundle) Remove() error {
	half := filepath.Join(filepath.Dir(b.Path), oldPrefix+b.ID)
	if err := Unmount(b.Path); err != nil {
		return err
	}
	if err := remove(half); err != nil { // an earlier attempt failed half way
		return err
	}
	failpoint.Hit("bundle.remove.unmounted")
	if err := os.Rename(b.Path, half); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("cannot remove bundle %s: %w", b.Path, err)
	}
	failpoint.Hit("bundle.remove.renamed")
	return remove(half)
}

func remove(path string) error {
	// Never remove through a mount: what is below it is not ours.
	if err := Unmount(path); err != nil {
		return err
	}
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("cannot remove bundle %s: %w", path, err)
	}
	return nil
}

// Unmount takes away what a shim may have mounted in a bundle, or in one that is half made or half removed.
func Unmount(path string) error {
	errs := []error{mount.Unmount(filepath.Join(path, shimapi.RootfsDir)), mount.Unmount(filepath.Join(path, shimapi.ShmDir))}
	pinned, err := os.ReadDir(filepath.Join(path, shimapi.NamespaceDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range pinned {
		errs = append(errs, mount.Unmount(filepath.Join(path, shimapi.NamespaceDir, e.Name())))
	}
	return errors.Join(errs...)
}

func (b *Bundle) file(name string) string { return filepath.Join(b.Path, name) }

// CheckpointDir is where a checkpoint is put that the task is to be restored from.
func (b *Bundle) CheckpointDir() string { return b.file("checkpoint") }

// LogFIFO is the path of the FIFO into which the shim logs.
func (b *Bundle) LogFIFO() string { return b.file(shimapi.LogFIFO) }

// SetShim writes down which binary keeps the task, and where it listens. Without a binary it is an endpoint, which somebody
// else serves.
func (b *Bundle) SetShim(binary string, p shimapi.BootstrapParams) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	if binary != "" {
		if err := b.write(binaryFile, []byte(binary)); err != nil {
			return err
		}
	}
	failpoint.Hit("bundle.shim.binary")
	return b.write(shimapi.BootstrapFile, data)
}

// SetRecord notes what the container of the task is, for a daemon whose database is lost. It means nothing to this package.
func (b *Bundle) SetRecord(record []byte) error {
	return os.WriteFile(b.file(recordFile), record, 0o600)
}

// Record gives what SetRecord noted, nil for nothing, and the container's spec.
func (b *Bundle) Record() (record, spec []byte, err error) {
	record, err = os.ReadFile(b.file(recordFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if spec, err = os.ReadFile(b.file(shimapi.ConfigFile)); err != nil {
		return nil, nil, err
	}
	if !json.Valid(spec) {
		return nil, nil, fmt.Errorf("%s is malformed: %w", b.file(shimapi.ConfigFile), errdefs.ErrDataLoss)
	}
	return record, spec, nil
}

// Doom notes that the task is to be removed as soon as that can be done.
func (b *Bundle) Doom() error { return os.WriteFile(b.file(doomedFile), nil, 0o600) }

// Doomed says whether that was noted.
func (b *Bundle) Doomed() bool {
	_, err := os.Lstat(b.file(doomedFile))
	return err == nil
}

// write replaces a file of the bundle: whoever reads it finds the old or the new one, whole.
func (b *Bundle) write(name string, data []byte) error {
	half := b.file("." + name + ".new")
	if err := os.WriteFile(half, data, 0o644); err != nil {
		return err
	}
	failpoint.Hit("bundle.write.half")
	return os.Rename(half, b.file(name))
}

// Joined says whether the task is kept by an endpoint, see shimapi.Endpoint.
func (b *Bundle) Joined() bool {
	binary, _, err := b.Shim()
	return err == nil && binary == ""
}

// SetMade notes that an endpoint has made the container.
func (b *Bundle) SetMade() error { return b.write(madeFile, nil) }

// Shim reads what SetShim wrote. NotFound when the daemon ended before it had spawned one.
func (b *Bundle) Shim() (binary string, p shimapi.BootstrapParams, err error) {
	data, err := os.ReadFile(b.file(shimapi.BootstrapFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", p, fmt.Errorf("bundle %s has no shim: %w", b.Path, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", p, err
	}
	if p, err = shimapi.ParseBootstrap(data); err != nil {
		return "", p, fmt.Errorf("bundle %s: %w: %w", b.Path, err, errdefs.ErrDataLoss)
	}
	name, err := os.ReadFile(b.file(binaryFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", p, err
	}
	return string(name), p, nil
}

// Ledger reads the shim's ledger; one that was never made is empty.
func (b *Bundle) Ledger() ([]*ledgerpb.Record, error) {
	records, err := ledger.Read(b.file(shimapi.LedgerFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return records, err
}

// Append writes records into the ledger of a shim that is dead, in its name. FailedPrecondition while one lives.
func (b *Bundle) Append(records ...*ledgerpb.Record) error {
	past, err := b.Ledger()
	if err != nil {
		return err
	}
	var header ledgerpb.Header
	for _, r := range past {
		if r.Header != nil {
			header = *r.Header
		}
	}
	l, err := ledger.Open(b.file(shimapi.LedgerFile), header)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range records {
		_, err := l.Append(r)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, l.Close())...)
}

// Cursor is the sequence number of the last event that was handed on; 0 for none.
func (b *Bundle) Cursor() uint64 {
	data, err := os.ReadFile(b.file(cursorFile))
	if err != nil || len(data) < cursorLen {
		return 0
	}
	return binary.LittleEndian.Uint64(data)
}

// Source names the ledger of this bundle among those of all bundles that ever were; empty for one that an older daemon
// made.
func (b *Bundle) Source() string {
	data, err := os.ReadFile(b.file(cursorFile))
	if err != nil || len(data) != cursorLen+nameLen {
		return ""
	}
	return b.Namespace + "/" + b.ID + "/" + hex.EncodeToString(data[cursorLen:])
}

// SetCursor writes the cursor; one write(2) of eight bytes is there whole or not at all.
func (b *Bundle) SetCursor(seq uint64) error {
	f, err := os.OpenFile(b.file(cursorFile), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(binary.LittleEndian.AppendUint64(nil, seq), 0)
	return errors.Join(err, f.Close())
}
