package eventlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/containerd/errdefs"

	records "github.com/managerd/managerd/protos/eventlog"
)

const (
	magic     = "mgrevts1"
	frameHead = 8
	maxRecord = 4 << 20 // bytes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errTorn says that the file ends within a frame.
var errTorn = errors.New("the file ends within a record")

func frame(r *records.Record) ([]byte, error) {
	payload, err := r.Marshal()
	if err != nil {
		return nil, fmt.Errorf("cannot encode event: %w", err)
	}
	if len(payload) > maxRecord {
		return nil, fmt.Errorf("event has %d bytes, the most is %d: %w", len(payload), maxRecord, errdefs.ErrInvalidArgument)
	}
	out := make([]byte, frameHead, frameHead+len(payload))
	binary.LittleEndian.PutUint32(out, uint32(len(payload)))
	binary.LittleEndian.PutUint32(out[4:], crc32.Checksum(payload, castagnoli))
	return append(out, payload...), nil
}

// next reads one frame and says how many bytes it has. io.EOF at the end, errTorn within a frame, DataLoss for a damaged
// one.
func next(r io.Reader) (*records.Record, int64, error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errTorn
		}
		return nil, 0, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n == 0 || n > maxRecord {
		return nil, 0, fmt.Errorf("record has length %d: %w", n, errdefs.ErrDataLoss)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errTorn
		}
		return nil, 0, err
	}
	if got, want := crc32.Checksum(payload, castagnoli), binary.LittleEndian.Uint32(head[4:]); got != want {
		return nil, 0, fmt.Errorf("record has checksum %08x, not %08x: %w", got, want, errdefs.ErrDataLoss)
	}
	record := &records.Record{}
	if err := record.Unmarshal(payload); err != nil {
		return nil, 0, fmt.Errorf("record: %w: %w", err, errdefs.ErrDataLoss)
	}
	if record.Header == nil && record.Event == nil {
		return nil, 0, fmt.Errorf("record is neither a header nor an event: %w", errdefs.ErrDataLoss)
	}
	return record, int64(frameHead) + int64(n), nil
}

// scan reads magic and frames, and returns the offset behind the last whole one.
func scan(f io.Reader, fn func(*records.Record) error) (at int64, torn bool, err error) {
	head := make([]byte, len(magic))
	if _, err := io.ReadFull(f, head); err != nil || string(head) != magic {
		return 0, false, fmt.Errorf("it begins with %q: %w", head, errdefs.ErrDataLoss)
	}
	at = int64(len(magic))
	for {
		r, n, err := next(f)
		switch {
		case errors.Is(err, io.EOF):
			return at, false, nil
		case errors.Is(err, errTorn):
			return at, true, nil
		case err == nil:
			err = fn(r)
		}
		if err != nil {
			return at, false, fmt.Errorf("at byte %d: %w", at, err)
		}
		at += n
	}
}
