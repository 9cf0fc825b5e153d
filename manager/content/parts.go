package content

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// partsFile, in the directory of an ingest that is written part by part, says how much of each part is there: a header
// (magic with the version, the boot in which it was written, the size of a part) and a slot for each part: how many of
// its bytes, from its beginning, are written, and how many of them are on disk for certain. Numbers are little endian.
// What is written outlives this process, what is on disk for certain also a power failure.
const partsFile = "parts"

const (
	partsMagic  = "mdparts1"
	partsHeader = 8 + 16 + 8
	partsSlot   = 4 + 4
	// maxPart is the largest part, in bytes: what its slot can count.
	maxPart = 1 << 30
	// maxParts bounds the file.
	maxParts = 1 << 20
)

// errParts is the error of a partsFile that makes no sense.
var errParts = errors.New("the record of its parts is damaged")

// parts is what partsFile holds.
type parts struct {
	boot  [16]byte
	size  int64 // of a part, but the last, in bytes
	slots []slot
}

type slot struct{ written, synced uint32 }

var boot = sync.OnceValue(func() (id [16]byte) {
	// Without it every boot is the same one: what the digest says counts in the end.
	if data, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		copy(id[:], strings.ReplaceAll(string(bytes.TrimSpace(data)), "-", ""))
	}
	return id
})

// newParts divides total bytes.
func newParts(total, size int64) *parts {
	size = min(max(size, 1, (total+maxParts-1)/maxParts), maxPart)
	return &parts{boot: boot(), size: size, slots: make([]slot, (total+size-1)/size)}
}

func (p *parts) encode() []byte {
	out := make([]byte, partsHeader, partsHeader+partsSlot*len(p.slots))
	copy(out, partsMagic)
	copy(out[8:], p.boot[:])
	binary.LittleEndian.PutUint64(out[24:], uint64(p.size))
	for _, s := range p.slots {
		out = s.append(out)
	}
	return out
}

func (s slot) append(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, s.written), s.synced)
}

func decodeParts(data []byte) (*parts, error) {
	if len(data) < partsHeader || (len(data)-partsHeader)%partsSlot != 0 || string(data[:8]) != partsMagic {
		return nil, errParts
	}
	p := &parts{size: int64(binary.LittleEndian.Uint64(data[24:]))}
	copy(p.boot[:], data[8:])
	if p.size < 1 || p.size > maxPart {
		return nil, errParts
	}
	for at := partsHeader; at < len(data); at += partsSlot {
		s := slot{binary.LittleEndian.Uint32(data[at:]), binary.LittleEndian.Uint32(data[at+4:])}
		if int64(s.written) > p.size || s.synced > s.written {
			return nil, errParts
		}
		p.slots = append(p.slots, s)
	}
	return p, nil
}

// readParts reads the record of an ingest, as far as it can be trusted now.
func readParts(dir string) (*parts, error) {
	data, err := os.ReadFile(filepath.Join(dir, partsFile))
	if err != nil {
		return nil, err
	}
	p, err := decodeParts(data)
	if err == nil && p.boot != boot() {
		for i := range p.slots {
			p.slots[i].written = p.slots[i].synced
		}
	}
	return p, err
}

// written is the number of bytes that are there.
func (p *parts) written() (n int64) {
	for _, s := range p.slots {
		n += int64(s.written)
	}
	return n
}

// prefix is how many bytes from the beginning are there.
func (p *parts) prefix() int64 {
	for i, s := range p.slots {
		if int64(s.written) < p.size {
			return int64(i)*p.size + int64(s.written)
		}
	}
	return int64(len(p.slots)) * p.size
}

// fits tells whether this can be a record of total bytes.
func (p *parts) fits(total int64) bool {
	n := int64(len(p.slots))
	return n == (total+p.size-1)/p.size && (n == 0 || int64(p.slots[n-1].written) <= total-(n-1)*p.size)
}

// flatten makes an ingest that was written part by part one that is written from the beginning on: what is not joined to
// the beginning is lost.
func flatten(dir string) error {
	p, err := readParts(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	data := filepath.Join(dir, "data")
	var keep int64
	if err == nil {
		fi, err := os.Stat(data)
		if err != nil {
			return err
		}
		keep = min(p.prefix(), fi.Size())
	} else if !errors.Is(err, errParts) {
		return err
	}
	if err := os.Truncate(data, keep); err != nil {
		return fmt.Errorf("cannot keep its beginning: %w", err)
	}
	return os.Remove(filepath.Join(dir, partsFile))
}
