package content

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/shimapi/failpoint"
)

// fileIngest is an ingest of files that is open.
type fileIngest struct {
	f      *files
	ns     string
	dir    string
	status Status
	file   *os.File // nil once it is closed or committed
	sum    hash.Hash
	alg    digest.Algorithm
}

// Ingest implements Backend.
func (f *files) Ingest(_ context.Context, ns string, want Status) (Session, error) {
	in, err := f.open(ns, want)
	if err != nil {
		return nil, err
	}
	if err := in.resume(); err != nil {
		return nil, errors.Join(err, in.Close())
	}
	return in, nil
}

// open finds or begins an ingest; its data is not open yet.
func (f *files) open(ns string, want Status) (*fileIngest, error) {
	in := &fileIngest{f: f, ns: ns, dir: f.ingest(ns, want.Ref), status: want}
	err := in.take()
	in.alg = in.status.Algorithm()
	in.sum = in.alg.Hash()
	return in, err
}

// take begins the ingest, or finds what an earlier writer said of it.
func (in *fileIngest) take() error {
	switch before, err := status(in.dir); {
	case errdefs.IsNotFound(err):
		return in.begin()
	case err != nil:
		return err
	case in.status.Expected != "" && before.Expected != "" && in.status.Expected != before.Expected:
		return fmt.Errorf("it was begun for %s, not for %s; abort it first: %w", before.Expected, in.status.Expected, errdefs.ErrFailedPrecondition)
	case in.status.Total > 0 && before.Total > 0 && in.status.Total != before.Total:
		return fmt.Errorf("it was begun for %d bytes, not for %d; abort it first: %w", before.Total, in.status.Total, errdefs.ErrFailedPrecondition)
	default:
		now := in.status
		in.status = before
		if now.Expected != "" {
			in.status.Expected = now.Expected
		}
		if now.Total > 0 {
			in.status.Total = now.Total
		}
	}
	return nil
}

// begin makes the directory of a new ingest; the ref file, without which there is none, comes last but data.
func (in *fileIngest) begin() error {
	if err := os.RemoveAll(in.dir); err != nil {
		return err
	}
	if err := os.Mkdir(in.dir, 0o700); err != nil {
		return err
	}
	started, err := in.status.StartedAt.MarshalText()
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{"total", strconv.AppendInt(nil, in.status.Total, 10)}, {"expected", []byte(in.status.Expected)}, {"startedat", started},
		{"data", nil}, {"ref", []byte(in.ns + separator + in.status.Ref)},
	} {
		if err := os.WriteFile(filepath.Join(in.dir, f.name), f.data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// resume opens the data. What an earlier writer left counts as written: it is taken into the digest.
func (in *fileIngest) resume() error {
	if err := flatten(in.dir); err != nil {
		return err
	}
	if err := in.openFile(); err != nil {
		return err
	}
	var err error
	in.status.Offset, err = io.Copy(in.sum, in.file)
	return err
}

func (in *fileIngest) openFile() (err error) {
	in.file, err = os.OpenFile(filepath.Join(in.dir, "data"), os.O_RDWR|os.O_CREATE, 0o600)
	return err
}

// Write implements Session.
func (in *fileIngest) Write(p []byte) (int, error) {
	n, err := in.file.Write(p)
	in.sum.Write(p[:n])
	in.status.Offset += int64(n)
	in.status.UpdatedAt = time.Now().UTC()
	return n, err
}

// Reset implements Session.
func (in *fileIngest) Reset() error {
	if _, err := in.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	in.sum.Reset()
	in.status.Offset = 0
	return in.file.Truncate(0)
}

// Status implements Session.
func (in *fileIngest) Status() Status { return in.status }

// Digest implements Session.
func (in *fileIngest) Digest() (digest.Digest, error) { return digest.NewDigest(in.alg, in.sum), nil }

// Sync implements Session.
func (in *fileIngest) Sync() error { return in.file.Sync() }

// Commit implements Session: it gives the data a place among the blobs. The ingest stays: a daemon that is killed before
// the record is written has lost nothing.
func (in *fileIngest) Commit(_ context.Context, d digest.Digest) error {
	path := in.f.path(d)
	if err := makeDir(filepath.Dir(path)); err != nil {
		return err
	}
	if err := place(in.dir, path); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it was aborted: %w", errdefs.ErrAborted)
	} else if err != nil {
		return err
	}
	failpoint.Hit("content.commit.renamed")
	return errors.Join(in.Close(), os.Chmod(path, 0o444), syncDir(filepath.Dir(path)))
}

// place makes the data of an ingest a blob as well, or where the filesystem has no hard links, instead.
func place(dir, path string) error {
	data, second := filepath.Join(dir, "data"), filepath.Join(dir, "blob")
	err := os.Link(data, second)
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return os.Rename(data, path)
	}
	return os.Rename(second, path)
}

// Discard implements Session.
func (in *fileIngest) Discard(context.Context) error { return os.RemoveAll(in.dir) }

// Close implements Session.
func (in *fileIngest) Close() error {
	if in.file == nil {
		return nil
	}
	f := in.file
	in.file = nil
	return f.Close()
}

// makeDir makes a directory, if there is none, so that it is there after a power failure.
func makeDir(path string) error {
	err := os.Mkdir(path, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
