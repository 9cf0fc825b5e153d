// Package blackbox is a shim's flight recorder: a file of fixed size in the bundle that holds the last things the shim
// did. The shim writes it through a shared mapping, so that what it did last is there when it hangs, is stopped or was
// killed, and whoever reads the file needs no answer from it.
//
// The file has Slots slots of slotSize bytes. Slot 0 is the magic, then zeros. Entry number n (1, 2, 3 ...) stands in slot
// 1 + (n-1) % (Slots-1), little endian:
//
//	number   uint64
//	time     int64, Unix time in nanoseconds
//	took     int64, nanoseconds; 0 where nothing is timed
//	pid      uint32, of the shim: a successor writes on in the same file
//	kind     uint8
//	length   uint8, of text
//	text     lengthMost bytes
//	checksum uint32, CRC-32C of all before
//
// A slot that was being written when the shim died has a wrong checksum, and is passed over.
package blackbox

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Slots is how many slots a file has; one of them is its head. Size is the file's size in bytes.
const (
	Slots    = 256
	slotSize = 256
	Size     = Slots * slotSize
)

// MaxText is the most bytes of text that an entry keeps.
const MaxText = slotSize - headLen - 4

const headLen = 8 + 8 + 8 + 4 + 1 + 1

var (
	magic      = []byte("mgrbbox1")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Kind says what an entry tells of.
type Kind uint8

// The kinds. Numbers are only added.
const (
	Note    Kind = 1 // the shim itself: it serves, took over, ends
	Request Kind = 2 // a request has come
	Answer  Kind = 3 // and was answered
	Phase   Kind = 4 // a part of a create, start or exec is done
	Event   Kind = 5 // an event was written to the ledger; exits are events
	Error   Kind = 6 // something failed
)

func (k Kind) String() string {
	switch k {
	case Note:
		return "note"
	case Request:
		return "request"
	case Answer:
		return "answer"
	case Phase:
		return "phase"
	case Event:
		return "event"
	case Error:
		return "error"
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// Entry is one thing that the shim did.
type Entry struct {
	Number uint64 // 1, 2, 3 ... over the life of the file
	Time   time.Time
	Took   time.Duration // 0 where nothing is timed
	PID    uint32        // of the shim that wrote it
	Kind   Kind
	Text   string
}

// encode fills slot, slotSize bytes.
func encode(slot []byte, e Entry) {
	binary.LittleEndian.PutUint64(slot, e.Number)
	binary.LittleEndian.PutUint64(slot[8:], uint64(e.Time.UnixNano()))
	binary.LittleEndian.PutUint64(slot[16:], uint64(e.Took))
	binary.LittleEndian.PutUint32(slot[24:], e.PID)
	slot[28] = byte(e.Kind)
	n := copy(slot[headLen:slotSize-4], e.Text)
	slot[29] = byte(n)
	clear(slot[headLen+n : slotSize-4])
	binary.LittleEndian.PutUint32(slot[slotSize-4:], crc32.Checksum(slot[:slotSize-4], castagnoli))
}

// decode reads slot; false for one that was never, or not wholly, written.
func decode(slot []byte) (Entry, bool) {
	number := binary.LittleEndian.Uint64(slot)
	if number == 0 || int(slot[29]) > MaxText ||
		binary.LittleEndian.Uint32(slot[slotSize-4:]) != crc32.Checksum(slot[:slotSize-4], castagnoli) {
		return Entry{}, false
	}
	return Entry{
		Number: number,
		Time:   time.Unix(0, int64(binary.LittleEndian.Uint64(slot[8:]))),
		Took:   time.Duration(binary.LittleEndian.Uint64(slot[16:])),
		PID:    binary.LittleEndian.Uint32(slot[24:]),
		Kind:   Kind(slot[28]),
		Text:   strings.ToValidUTF8(string(slot[headLen:headLen+int(slot[29])]), "\uFFFD"),
	}, true
}

// Read reads the box at path, oldest entry first, whatever its shim is doing. The error wraps ENOENT for a shim that keeps
// none, ErrDataLoss for a file that is no black box.
func Read(path string) ([]Entry, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read black box: %w", err)
	}
	entries, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("cannot read black box %s: %w", path, err)
	}
	return entries, nil
}

func parse(data []byte) ([]Entry, error) {
	if len(data) != Size || !bytes.HasPrefix(data, magic) {
		return nil, fmt.Errorf("%d bytes that are no black box: %w", len(data), errdefs.ErrDataLoss)
	}
	var entries []Entry
	for at := slotSize; at < Size; at += slotSize {
		if e, ok := decode(data[at : at+slotSize]); ok {
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b Entry) int {
		if a.Number < b.Number {
			return -1
		}
		return 1
	})
	return entries, nil
}
