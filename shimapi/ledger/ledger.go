// Package ledger is the append-only file in which a shim writes every exit and event before it tells anyone. It lies in
// the bundle, so that it dies with the boot like what it speaks of, and the daemon reads it when no shim lives.
//
// The file is eight bytes of magic, then frames:
//
//	length   uint32, little endian: bytes of payload, 1 to MaxRecord
//	checksum uint32, little endian: CRC-32C (Castagnoli) of payload
//	payload  a protobuf managerd.ledger.Record
//
// A record is complete or not there: a torn frame at the end (the writer was killed) is cut off by the next Open and
// passed over by Read. Records that nobody needs any more can be dropped (Compact); a Trim then stands first and says up to
// which number there may be gaps. Before that version of this package, a reader took a gap for damage. It is not synced to a disk: killing a process loses nothing that was written, and a machine that
// loses power loses the containers too.
package ledger

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sort"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	ledger "github.com/managerd/managerd/protos/ledger"

	"github.com/managerd/managerd/shimapi/failpoint"
)

// Schema is the version in the header that this code writes.
const Schema = 1

// MaxRecord is the most bytes a record may have.
const MaxRecord = 1 << 20

// stride: the offset of every stride-th record is kept in memory, so that thousands of execs cost nearly none.
const stride = 64

const frameHead = 8

var (
	magic      = []byte("mgrledg1")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Ledger is an open ledger, with one writer: the shim.
type Ledger struct {
	path    string
	reading sync.RWMutex // read-held while file is read; taken after mu
	file    *os.File     // replaced with both locks held

	mu      sync.Mutex
	end     int64         // where the next frame goes
	seq     uint64        // of the last record
	count   int           // of records in the file
	index   []place       // of every stride-th record
	header  uint64        // sequence number of the newest header
	trim    ledger.Trim   // what is not there any more
	changed chan struct{} // closed by the next append
	broken  error         // an append failed half way and could not be undone
}

// place is where a record stands.
type place struct {
	seq uint64
	at  int64
}

// Open opens or makes the ledger at path, cuts off a torn tail, and appends h. FailedPrecondition when another process has
// it open: one shim keeps a bundle. A damaged record before the tail is an
// ErrDataLoss that says where; the file is left as it is.
func Open(path string, h ledger.Header) (*Ledger, error) {
	f, err := openLocked(path)
	if err != nil {
		return nil, err
	}
	l := &Ledger{path: path, file: f, changed: make(chan struct{})}
	if err := l.recover(); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("cannot use ledger %s: %w", path, err)
	}
	h.Schema = Schema
	if _, err := l.Append(&ledger.Record{Header: &h}); err != nil {
		_ = f.Close()
		return nil, err
	}
	return l, nil
}

// openLocked opens the file and makes sure that it is ours. Who had it before may have replaced it meanwhile.
func openLocked(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("cannot open ledger: %w", err)
		}
		err = lock(f)
		if err == nil {
			var own, now os.FileInfo
			if own, err = f.Stat(); err == nil {
				if now, err = os.Stat(path); err == nil && os.SameFile(own, now) {
					return f, nil
				}
			}
		}
		_ = f.Close()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("cannot use ledger %s: %w", path, err)
		}
	}
}

// locking is how long Open waits for the end of another writer: of one that was killed a moment ago, children may be left
// that have not executed their program yet, and hold its files.
const locking = 2 * time.Second

// lock keeps a second shim from the bundle. The kernel lets go of it with the last descriptor, however the holder ends.
func lock(f *os.File) error {
	deadline := time.Now().Add(locking)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("cannot lock it: %w", err)
		case time.Now().After(deadline):
			return fmt.Errorf("another process keeps this bundle: %w", errdefs.ErrFailedPrecondition)
		}
		time.Sleep(5 * time.Millisecond) // flock(2) cannot wait for a limited time
	}
}

func (l *Ledger) recover() error {
	fi, err := l.file.Stat()
	if err != nil {
		return err
	}
	if fi.Size() < int64(len(magic)) {
		if err := l.file.Truncate(0); err != nil {
			return err
		}
		if _, err := l.file.WriteAt(magic, 0); err != nil {
			return err
		}
		l.end = int64(len(magic))
		return nil
	}
	end, err := scan(bufio.NewReader(io.NewSectionReader(l.file, 0, fi.Size())), func(r *ledger.Record, at int64) error {
		switch {
		case r.Trim != nil && l.count == 0 && l.trim.UpTo == 0:
			l.trim = *r.Trim
			return nil
		case r.Trim != nil, r.Seq <= l.seq, r.Seq > max(l.seq, l.trim.UpTo)+1:
			return fmt.Errorf("record at byte %d has sequence number %d after %d: %w", at, r.Seq, l.seq, errdefs.ErrDataLoss)
		}
		l.note(r, at)
		return nil
	})
	if err != nil {
		return err
	}
	l.end, l.seq = end, max(l.seq, l.trim.UpTo)
	return l.file.Truncate(end)
}

func (l *Ledger) note(r *ledger.Record, at int64) {
	if l.seq = r.Seq; r.Header != nil {
		l.header = r.Seq
	}
	if l.count%stride == 0 {
		l.index = append(l.index, place{r.Seq, at})
	}
	l.count++
}

// encode gives the frame of a record.
func encode(r *ledger.Record) ([]byte, error) {
	payload, err := r.Marshal()
	if err != nil {
		return nil, fmt.Errorf("cannot encode ledger record: %w", err)
	}
	if len(payload) > MaxRecord {
		return nil, fmt.Errorf("ledger record has %d bytes, the most is %d: %w", len(payload), MaxRecord, errdefs.ErrInvalidArgument)
	}
	frame := make([]byte, frameHead, frameHead+len(payload))
	binary.LittleEndian.PutUint32(frame, uint32(len(payload)))
	binary.LittleEndian.PutUint32(frame[4:], crc32.Checksum(payload, castagnoli))
	return append(frame, payload...), nil
}

// Append writes r, with its sequence number and time set, and returns the number once the record is in the file.
func (l *Ledger) Append(r *ledger.Record) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != nil {
		return 0, l.broken
	}
	r.Seq, r.UnixNano = l.seq+1, time.Now().UnixNano()
	frame, err := encode(r)
	if err != nil {
		return 0, err
	}
	if _, err := l.file.WriteAt(frame, l.end); err != nil {
		if terr := l.file.Truncate(l.end); terr != nil {
			l.broken = fmt.Errorf("ledger is unusable after a failed write: %w", terr)
		}
		return 0, fmt.Errorf("cannot write ledger: %w", err)
	}
	failpoint.Hit("ledger.appended")
	l.note(r, l.end)
	l.end += int64(len(frame))
	close(l.changed)
	l.changed = make(chan struct{})
	return r.Seq, nil
}

// Last is the newest sequence number.
func (l *Ledger) Last() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq
}

// Since reads at most limit records with a sequence number above since, oldest first. more is closed when there is, or
// may be, something newer than what was returned.
func (l *Ledger) Since(since uint64, limit int) (records []*ledger.Record, more <-chan struct{}, err error) {
	l.mu.Lock()
	seq, end, more := l.seq, l.end, (<-chan struct{})(l.changed)
	// The last place that is not behind the first record above since, or the first one.
	i := sort.Search(len(l.index), func(i int) bool { return l.index[i].seq > since+1 })
	if since >= seq || limit <= 0 || len(l.index) == 0 {
		l.mu.Unlock()
		return nil, more, nil
	}
	at := l.index[max(i-1, 0)].at
	l.reading.RLock() // before mu is let go of: at is a place in this file
	l.mu.Unlock()
	defer l.reading.RUnlock()
	_, err = scanFrames(io.NewSectionReader(l.file, at, end-at), at, func(r *ledger.Record, _ int64) error {
		if r.Seq > since {
			records = append(records, r)
		}
		if len(records) == limit {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return records, more, err
}

var errEnough = errors.New("enough")

// Close closes the file.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}

// Read reads a ledger that nobody, or somebody else, has open. A torn tail is passed over; a damaged record ends the
// reading with ErrDataLoss, and what stands before it is returned all the same.
func Read(path string) ([]*ledger.Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot open ledger: %w", err)
	}
	defer func() { _ = f.Close() }()
	var records []*ledger.Record
	_, err = scan(bufio.NewReader(f), func(r *ledger.Record, _ int64) error {
		records = append(records, r)
		return nil
	})
	if err != nil {
		return records, fmt.Errorf("cannot read ledger %s: %w", path, err)
	}
	return records, nil
}

// scan reads magic and frames, and returns the offset behind the last whole one.
func scan(r io.Reader, fn func(*ledger.Record, int64) error) (int64, error) {
	head := make([]byte, len(magic))
	if n, err := io.ReadFull(r, head); err != nil {
		if bytes.HasPrefix(magic, head[:n]) {
			return 0, nil // killed while it made the file
		}
		return 0, fmt.Errorf("not a ledger: %w", errdefs.ErrDataLoss)
	}
	if !bytes.Equal(head, magic) {
		return 0, fmt.Errorf("not a ledger, it begins with %q: %w", head, errdefs.ErrDataLoss)
	}
	return scanFrames(r, int64(len(magic)), fn)
}

func scanFrames(r io.Reader, at int64, fn func(*ledger.Record, int64) error) (int64, error) {
	torn := func(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
	var head [frameHead]byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if torn(err) {
				return at, nil
			}
			return at, err
		}
		n := binary.LittleEndian.Uint32(head[:])
		if n == 0 || n > MaxRecord {
			return at, fmt.Errorf("record at byte %d has length %d: %w", at, n, errdefs.ErrDataLoss)
		}
		payload := make([]byte, n)
		if _, err := io.ReadFull(r, payload); err != nil {
			if torn(err) {
				return at, nil
			}
			return at, err
		}
		if got, want := crc32.Checksum(payload, castagnoli), binary.LittleEndian.Uint32(head[4:]); got != want {
			return at, fmt.Errorf("record at byte %d has checksum %08x, not %08x: %w", at, got, want, errdefs.ErrDataLoss)
		}
		record := &ledger.Record{}
		if err := record.Unmarshal(payload); err != nil {
			return at, fmt.Errorf("record at byte %d: %w: %w", at, err, errdefs.ErrDataLoss)
		}
		if err := fn(record, at); err != nil {
			return at, err
		}
		at += frameHead + int64(n)
	}
}
