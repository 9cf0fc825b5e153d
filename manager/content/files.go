package content

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Dir is the directory of files below the daemon's root.
const Dir = "io.containerd.content.v1.content"

// files is the Backend of this daemon's own disk, as containerd lays content out: blobs/ALGORITHM/HEX, and
// ingest/HASH/{data,ref,total,expected,startedat} for what is being written.
type files struct{ root string }

func openFiles(root string) (*files, error) {
	f := &files{filepath.Join(root, Dir)}
	for _, d := range []string{f.blobs(), f.ingests()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *files) blobs() string   { return filepath.Join(f.root, "blobs") }
func (f *files) ingests() string { return filepath.Join(f.root, "ingest") }

func (f *files) path(d digest.Digest) string {
	return filepath.Join(f.blobs(), d.Algorithm().String(), d.Encoded())
}

// separator stands between namespace and reference in an ingest's ref file; neither can contain it.
const separator = "\x00"

func (f *files) ingest(ns, ref string) string {
	sum := sha256.Sum256([]byte(ns + separator + ref))
	return filepath.Join(f.ingests(), hex.EncodeToString(sum[:]))
}

// each calls fn for every file among the blobs, with ALGORITHM:HEX as far as its name is one.
func (f *files) each(fn func(d digest.Digest, e fs.DirEntry) error) error {
	algorithms, err := os.ReadDir(f.blobs())
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		found, err := os.ReadDir(filepath.Join(f.blobs(), a.Name()))
		if err != nil {
			return err
		}
		for _, e := range found {
			if err := fn(digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), e.Name()), e); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweep removes what is not known.
func (f *files) sweep(known func(d string) bool) error {
	return f.each(func(d digest.Digest, _ fs.DirEntry) error {
		if known(d.String()) {
			return nil
		}
		alg, hex, _ := strings.Cut(d.String(), ":")
		return os.Remove(filepath.Join(f.blobs(), alg, hex))
	})
}

// Blobs implements Backend: all of them are ours.
func (f *files) Blobs(context.Context, bool) (map[digest.Digest]int64, error) {
	out := map[digest.Digest]int64{}
	return out, f.each(func(d digest.Digest, e fs.DirEntry) error {
		if fi, err := e.Info(); err == nil && d.Validate() == nil && fi.Mode().IsRegular() {
			out[d] = fi.Size()
		}
		return nil
	})
}

type file struct {
	*os.File
	size int64
}

func (f file) Size() int64 { return f.size }

// Open implements Backend.
func (f *files) Open(_ context.Context, d digest.Digest, size int64) (Reader, error) {
	blob, err := os.Open(f.path(d))
	if err != nil {
		return nil, missingFile(err)
	}
	return file{blob, size}, nil
}

func missingFile(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// Stat implements Backend.
func (f *files) Stat(_ context.Context, d digest.Digest) (int64, error) {
	fi, err := os.Stat(f.path(d))
	if err != nil {
		return 0, missingFile(err)
	}
	return fi.Size(), nil
}

// Remove implements Backend.
func (f *files) Remove(_ context.Context, d digest.Digest) error {
	if err := os.Remove(f.path(d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// damagedDir holds blobs that are not what their digest says. They are never removed by us.
const damagedDir = "damaged"

// setAside takes a blob away from its place, and says where to.
func (f *files) setAside(d digest.Digest) (string, error) {
	aside := filepath.Join(f.root, damagedDir, d.Algorithm().String()+"-"+d.Encoded())
	if err := os.MkdirAll(filepath.Dir(aside), 0o700); err != nil {
		return "", err
	}
	return aside, os.Rename(f.path(d), aside)
}

// Status implements Backend.
func (f *files) Status(_ context.Context, ns, ref string) (Status, error) {
	return status(f.ingest(ns, ref))
}

func status(dir string) (st Status, err error) {
	data, err := os.ReadFile(filepath.Join(dir, "ref"))
	if errors.Is(err, fs.ErrNotExist) {
		return st, errdefs.ErrNotFound
	}
	if err != nil {
		return st, err
	}
	_, st.Ref, _ = strings.Cut(string(data), separator)
	fi, err := os.Stat(filepath.Join(dir, "data"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = errdefs.ErrNotFound
		}
		return st, err
	}
	st.Offset, st.UpdatedAt = fi.Size(), fi.ModTime()
	if p, err := readParts(dir); err == nil {
		st.Offset = p.written()
	} else if !errors.Is(err, fs.ErrNotExist) {
		st.Offset = 0 // which bytes are there is not known
	}
	if data, err := os.ReadFile(filepath.Join(dir, "total")); err == nil {
		st.Total, _ = strconv.ParseInt(string(data), 10, 64)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "expected")); err == nil {
		if d := digest.Digest(data); d.Validate() == nil {
			st.Expected = d
		}
	}
	if data, err := os.ReadFile(filepath.Join(dir, "startedat")); err == nil {
		_ = st.StartedAt.UnmarshalText(data)
	}
	return st, nil
}

// Ingests implements Backend. What is just being made, or is half gone, is none.
func (f *files) Ingests(context.Context) (out []Ingest, err error) {
	dirs, err := os.ReadDir(f.ingests())
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		dir := filepath.Join(f.ingests(), d.Name())
		data, err := os.ReadFile(filepath.Join(dir, "ref"))
		if err != nil {
			continue
		}
		ns, ref, ok := strings.Cut(string(data), separator)
		if st, err := status(dir); ok && err == nil && f.ingest(ns, ref) == dir {
			out = append(out, Ingest{ns, st})
		}
	}
	return out, nil
}

// Abort implements Backend.
func (f *files) Abort(_ context.Context, ns, ref string) error {
	dir := f.ingest(ns, ref)
	if _, err := os.Stat(dir); err != nil {
		return errdefs.ErrNotFound
	}
	return os.RemoveAll(dir)
}

// committed tells whether the data of an ingest is a blob by now.
func committed(dir string) bool {
	_ = os.Remove(filepath.Join(dir, "blob")) // see place
	var st unix.Stat_t
	return unix.Stat(filepath.Join(dir, "data"), &st) == nil && st.Nlink > 1
}

// sweepIngests removes what a daemon that was killed left of ingests that were just begun, or were just committed.
func (f *files) sweepIngests() error {
	dirs, err := os.ReadDir(f.ingests())
	if err != nil {
		return err
	}
	for _, d := range dirs {
		dir := filepath.Join(f.ingests(), d.Name())
		if _, err := status(dir); errdefs.IsNotFound(err) || committed(dir) {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}
