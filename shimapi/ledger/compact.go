package ledger

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	ledger "github.com/managerd/managerd/protos/ledger"
)

// Compact drops the records up to upTo that keep, called for each in order, says no to; the newest header stays. Sequence
// numbers stay as they are, with gaps. The file is replaced as a whole: whoever kills us finds the old one or the new one,
// and who has the old one open reads that to its end. On an error it is as it was.
func (l *Ledger) Compact(upTo uint64, keep func(*ledger.Record) bool) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != nil {
		return l.broken
	}
	upTo = min(upTo, l.seq)
	if upTo <= l.trim.UpTo {
		return nil
	}
	half := l.path + ".new"
	f, err := os.OpenFile(half, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		// It is ours before it has the name, and when a successor opens it.
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	next := &Ledger{file: f, path: l.path, trim: ledger.Trim{UpTo: upTo, Dropped: l.trim.Dropped}, header: l.header}
	if err == nil {
		err = l.copyTo(next, keep)
	}
	if err == nil {
		err = os.Rename(half, l.path)
	}
	if err != nil {
		if f != nil {
			_ = f.Close()
			_ = os.Remove(half)
		}
		return fmt.Errorf("cannot compact ledger: %w", err)
	}
	l.reading.Lock()
	defer l.reading.Unlock()
	_ = l.file.Close()
	l.file, l.end, l.count, l.index, l.trim = next.file, next.end, next.count, next.index, next.trim
	return nil
}

// copyTo writes what stays of l into a file of next.
func (l *Ledger) copyTo(next *Ledger, keep func(*ledger.Record) bool) error {
	dropped := uint64(0)
	var kept []*ledger.Record
	all := bufio.NewReader(io.NewSectionReader(l.file, 0, l.end))
	_, err := scan(all, func(r *ledger.Record, _ int64) error {
		switch {
		case r.Trim != nil:
		case r.Seq > next.trim.UpTo, r.Header != nil && r.Seq == l.header, r.Header == nil && keep(r):
			kept = append(kept, r)
		default:
			dropped++
		}
		return nil
	})
	if err != nil {
		return err
	}
	next.trim.Dropped += dropped
	out := bufio.NewWriter(next.file)
	n, err := out.Write(magic)
	next.end = int64(n)
	for _, r := range append([]*ledger.Record{{Trim: &next.trim}}, kept...) {
		frame, ferr := encode(r)
		if ferr != nil {
			return ferr
		}
		n, werr := out.Write(frame)
		err = errors.Join(err, werr)
		if r.Trim == nil {
			next.note(r, next.end)
		}
		next.end += int64(n)
	}
	return errors.Join(err, out.Flush())
}

// Trimmed is the sequence number up to which records may have been dropped; 0 when none were.
func (l *Ledger) Trimmed() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.trim.UpTo
}

// Size is how many bytes the file has.
func (l *Ledger) Size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end
}

// TrimmedBy is Trimmed for the records that Read gave.
func TrimmedBy(records []*ledger.Record) uint64 {
	if len(records) > 0 && records[0].Trim != nil {
		return records[0].Trim.UpTo
	}
	return 0
}
