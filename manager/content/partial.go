package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi/failpoint"
)

// syncEvery is how many bytes may be written before they are put on disk, in the background.
const syncEvery = 32 << 20

// Partial is an ingest of which parts may be written at the same time, each from its beginning. What was written counts
// after the process was killed. Nobody else writes the ingest until it is closed.
type Partial interface {
	// Total is the size of the blob to be, in bytes.
	Total() int64
	// Written is how many bytes are there.
	Written() int64
	// Missing gives the parts that are not whole, in order.
	Missing() []Part
	// WriteAt writes what comes next in a part: off must be where that part stands, and b end in it, or it is OutOfRange.
	// Different parts may be written at the same time.
	WriteAt(b []byte, off int64) (int, error)
	// Commit makes a blob of it, see Writer.Commit. FailedPrecondition when a part is missing, or when the digest is another
	// one; the ingest is of no use then, and gone when it is closed.
	Commit(ctx context.Context, labels map[string]string) error
	// Open reads what is written, from the beginning on; a read waits for what is not there yet. NotImplemented where only
	// blobs can be read. The caller closes it, which may be later than the Partial.
	Open(ctx context.Context) (io.ReadCloser, error)
	// Close lets go of the ingest, which stays as it is unless it was committed. Nobody may be writing any more. Those who read
	// it fail, unless all of it is there.
	Close() error
}

// Part is a part of a blob that is not whole: bytes Start to End (exclusive), of which those before Next are there.
type Part struct {
	Index            int
	Start, Next, End int64
}

// Partial opens an ingest of total bytes with the digest expected, new or where an earlier writer, of whichever kind,
// stopped. partSize is how large its parts are if it is new, in bytes. Errors are those of Writer. In files, room for all of
// it is reserved at once, so that a full disk is found before anything is fetched. The caller closes it.
func (s *Store) Partial(ctx context.Context, ref string, expected digest.Digest, total, partSize int64) (Partial, error) {
	if err := valid(expected); err != nil {
		return nil, err
	}
	if total > maxPart*maxParts {
		return nil, fmt.Errorf("ingest %q is to have %d bytes, of which there is no room: the most is %d: %w", ref, total, int64(maxPart*maxParts), errdefs.ErrInvalidArgument)
	}
	f, ok := s.backend.(*files)
	if !ok {
		return s.sequence(ctx, ref, expected, total)
	}
	p := &parallel{changed: make(chan struct{}), syncing: make(chan struct{}, 1)}
	p.ctx, p.stop = context.WithCancel(context.Background())
	w, err := s.writer(ctx, ref, expected, total, func(_ context.Context, ns string, want Status) (Session, error) {
		in, err := f.open(ns, want)
		if err == nil {
			err = p.open(in, total, partSize)
		}
		if err != nil {
			return nil, errors.Join(err, in.Close())
		}
		return in, nil
	})
	if err != nil {
		p.stop()
		return nil, err
	}
	p.w = w
	p.jobs.Go(p.hash)
	p.jobs.Go(p.sync)
	return p, nil
}

// parallel is a Partial of files. What came before the last sync outlives also a power failure. Its digest is taken, and it
// can be read, from the beginning on as far as it has no holes, while the rest is written.
type parallel struct {
	w     *Writer
	in    *fileIngest // of w
	table *os.File    // partsFile

	mu      sync.Mutex
	parts   *parts
	prefix  int64         // bytes from the beginning without a hole
	hashed  int64         // of these
	dirty   int64         // bytes written since the last sync was begun
	changed chan struct{} // closed, and made anew, when something of the above or below changes
	failed  error         // why the rest will not come

	syncing chan struct{} // asks for a sync
	ctx     context.Context
	stop    context.CancelFunc // ends the jobs
	jobs    sync.WaitGroup     // hash, sync
}

func (p *parallel) open(in *fileIngest, total, partSize int64) error {
	p.in = in
	if err := in.openFile(); err != nil {
		return err
	}
	fi, err := in.file.Stat()
	if err != nil {
		return err
	}
	if err := reserve(in.file, total); err != nil {
		// It would not fit later either: nothing of it is kept.
		return errors.Join(fmt.Errorf("there is no room for its %d bytes in %s: %w", total, filepath.Dir(in.dir), err), os.RemoveAll(in.dir))
	}
	known, err := readParts(in.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist): // new, or written from the beginning on
		known = newParts(total, partSize)
		for i, left := 0, min(fi.Size(), total); left > 0; i++ {
			n := min(left, known.size)
			known.slots[i] = slot{written: uint32(n)}
			left -= n
		}
	case errors.Is(err, errParts) || err == nil && (!known.fits(total) || fi.Size() > total):
		known = newParts(total, partSize)
	case err != nil:
		return err
	default:
		known.boot = boot()
	}
	p.parts = known
	p.prefix = min(known.prefix(), total)
	// First the size of the data, then the record that speaks of it.
	if err := in.file.Truncate(total); err != nil {
		return err
	}
	name := filepath.Join(in.dir, partsFile)
	if err := os.WriteFile(name+".new", known.encode(), 0o600); err != nil {
		return err
	}
	if err := os.Rename(name+".new", name); err != nil {
		return err
	}
	p.table, err = os.OpenFile(name, os.O_WRONLY, 0)
	return err
}

// reserve takes the room for a file, where the filesystem can. What cannot fit is not tried: that would fill the disk for
// a while.
func reserve(f *os.File, size int64) error {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(int(f.Fd()), &fs), unix.Fstat(int(f.Fd()), &st)); err != nil {
		return err
	}
	need := size - st.Blocks*512
	if need <= 0 {
		return nil
	}
	if uint64(need)/uint64(fs.Bsize) >= fs.Bavail {
		return unix.ENOSPC
	}
	for {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS):
			return nil
		}
		return err
	}
}

// Total is the size of the blob to be, in bytes.
func (p *parallel) Total() int64 { return p.in.status.Total }

// Written is how many bytes are there.
func (p *parallel) Written() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.parts.written()
}

// Missing gives the parts that are not whole, in order.
func (p *parallel) Missing() (out []Part) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, s := range p.parts.slots {
		start := int64(i) * p.parts.size
		m := Part{Index: i, Start: start, Next: start + int64(s.written), End: min(start+p.parts.size, p.Total())}
		if m.Next < m.End {
			out = append(out, m)
		}
	}
	return out
}

// WriteAt writes what comes next in a part: off must be where that part stands, and b end in it, or it is OutOfRange.
// Different parts may be written at the same time.
func (p *parallel) WriteAt(b []byte, off int64) (int, error) {
	if err := p.w.usable(); err != nil {
		return 0, err
	}
	i := int(off / p.parts.size)
	end := min(int64(i+1)*p.parts.size, p.Total())
	p.mu.Lock()
	ok := off >= 0 && i < len(p.parts.slots) && off == int64(i)*p.parts.size+int64(p.parts.slots[i].written) && off+int64(len(b)) <= end
	p.mu.Unlock()
	if !ok {
		return 0, fmt.Errorf("ingest %q: %d bytes at %d are not what comes next in a part: %w", p.w.ref, len(b), off, errdefs.ErrOutOfRange)
	}
	n, err := p.in.file.WriteAt(b, off)
	if n == 0 {
		return n, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.parts.slots[i].written += uint32(n)
	if err := p.noteLocked(i); err != nil {
		return n, err
	}
	failpoint.Hit("content.partial.noted")
	if p.dirty += int64(n); p.dirty >= syncEvery {
		p.dirty = 0
		select {
		case p.syncing <- struct{}{}:
		default:
		}
	}
	if before := p.prefix; off <= before {
		if p.prefix = min(p.parts.prefix(), p.Total()); p.prefix > before {
			p.tellLocked()
		}
	}
	return n, err
}

// noteLocked writes a slot to the record.
func (p *parallel) noteLocked(i int) error {
	_, err := p.table.WriteAt(p.parts.slots[i].append(nil), int64(partsHeader+i*partsSlot))
	return err
}

func (p *parallel) tellLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// fail has those who wait know that the rest will not come.
func (p *parallel) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failed == nil {
		p.failed = err
		p.tellLocked()
	}
}

// until waits for ok, which is called with the lock held, or for a failure.
func (p *parallel) until(ctx context.Context, ok func() bool) error {
	for {
		p.mu.Lock()
		done, failed, changed := ok(), p.failed, p.changed
		p.mu.Unlock()
		if done {
			return nil
		}
		if failed != nil {
			return failed
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// hash takes the digest of what is there from the beginning on.
func (p *parallel) hash() {
	buf := make([]byte, min(1<<20, max(p.Total(), 1)))
	for at := int64(0); at < p.Total(); {
		var to int64
		if p.until(p.ctx, func() bool { to = p.prefix; return to > at }) != nil {
			return
		}
		n, err := p.in.file.ReadAt(buf[:min(int64(len(buf)), to-at)], at)
		if n == 0 {
			p.fail(fmt.Errorf("cannot read ingest %q at %d: %w", p.w.ref, at, err))
			return
		}
		p.in.sum.Write(buf[:n])
		at += int64(n)
		p.mu.Lock()
		p.hashed = at
		if at == p.Total() {
			p.tellLocked()
		}
		p.mu.Unlock()
	}
}

// sync puts on disk what is written, when it is asked to.
func (p *parallel) sync() {
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-p.syncing:
		}
		p.mu.Lock()
		seen := append([]slot(nil), p.parts.slots...)
		p.mu.Unlock()
		if err := unix.Fdatasync(int(p.in.file.Fd())); err != nil {
			p.fail(fmt.Errorf("cannot sync ingest %q: %w", p.w.ref, err))
			return
		}
		p.mu.Lock()
		for i, s := range seen {
			if p.parts.slots[i].synced == s.written {
				continue
			}
			p.parts.slots[i].synced = s.written
			if err := p.noteLocked(i); err != nil {
				p.mu.Unlock()
				p.fail(err)
				return
			}
		}
		p.mu.Unlock()
		_ = unix.Fdatasync(int(p.table.Fd())) // what is not on disk is fetched again
	}
}

// Commit waits for the digest of all that was written, and makes a blob of it, see Writer.Commit. FailedPrecondition when
// a part is missing, or when the digest is another one; the ingest is of no use then, and gone when it is closed.
func (p *parallel) Commit(ctx context.Context, labels map[string]string) error {
	if missing := p.Missing(); len(missing) > 0 {
		return fmt.Errorf("cannot commit %q: bytes %d to %d are missing: %w", p.w.ref, missing[0].Next, missing[0].End, errdefs.ErrFailedPrecondition)
	}
	if err := p.until(ctx, func() bool { return p.hashed == p.Total() }); err != nil {
		return fmt.Errorf("cannot commit %q: %w", p.w.ref, err)
	}
	p.end()
	p.in.status.Offset, p.in.status.UpdatedAt = p.Total(), time.Now().UTC()
	return p.w.Commit(ctx, p.Total(), p.in.status.Expected, labels)
}

// end ends the jobs and waits for them.
func (p *parallel) end() {
	p.stop()
	p.jobs.Wait()
}

// Close lets go of the ingest, which stays as it is unless it was committed. Nobody may be writing any more. Those who
// read it fail, unless all of it is there.
func (p *parallel) Close() error {
	p.fail(fmt.Errorf("ingest %q was closed before it was whole: %w", p.w.ref, errdefs.ErrAborted))
	p.end()
	return errors.Join(p.w.Close(), p.table.Close())
}

// Open reads what is written, from the beginning on; a read waits for what is not there yet. The caller closes it, which
// may be later than the Partial.
func (p *parallel) Open(ctx context.Context) (io.ReadCloser, error) {
	f, err := os.Open(filepath.Join(p.in.dir, "data"))
	if err != nil {
		return nil, fmt.Errorf("ingest %q: %w: %w", p.w.ref, err, errdefs.ErrAborted)
	}
	return &partialReader{p: p, ctx: ctx, File: f}, nil
}

type partialReader struct {
	*os.File
	p   *parallel
	ctx context.Context
	at  int64
}

func (r *partialReader) Read(b []byte) (int, error) {
	if r.at == r.p.Total() {
		return 0, io.EOF
	}
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	var to int64
	if err := r.p.until(r.ctx, func() bool { to = r.p.prefix; return to > r.at }); err != nil {
		return 0, err
	}
	n, err := r.File.ReadAt(b[:min(int64(len(b)), to-r.at)], r.at)
	r.at += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}
