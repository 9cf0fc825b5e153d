package logsink

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
)

// record is what a successor needs to know. On disk it is one block of fixed size, written by one pwrite:
//
//	magic, dev, ino, length, then for each stream done, entries lost, bytes lost; little-endian, 8 bytes each
type record struct {
	file    identity
	length  int64 // of the file: what is beyond is of no account
	streams [2]progress
}

// progress is how far a stream has come.
type progress struct {
	done int64 // bytes of the spool that are in the log, or were dropped
	lost lost  // what was dropped and not yet told of
}

type lost struct{ entries, bytes int64 }

// magic is "logsink" and a version.
const magic = 0x01_6b6e6973_676f6c

const recordSize = 8 * (4 + 2*3)

func (r *record) write(f *os.File) error {
	var b [recordSize]byte
	at := 0
	for _, v := range []uint64{
		magic, r.file.dev, r.file.ino, uint64(r.length),
		uint64(r.streams[0].done), uint64(r.streams[0].lost.entries), uint64(r.streams[0].lost.bytes),
		uint64(r.streams[1].done), uint64(r.streams[1].lost.entries), uint64(r.streams[1].lost.bytes),
	} {
		binary.LittleEndian.PutUint64(b[at:], v)
		at += 8
	}
	_, err := f.WriteAt(b[:], 0)
	return err
}

// read reads a record. An empty file is one whose writer died before it wrote any.
func (r *record) read(f *os.File) error {
	var b [recordSize]byte
	n, err := f.ReadAt(b[:], 0)
	if n == 0 && err == io.EOF {
		return nil
	}
	if err != nil || binary.LittleEndian.Uint64(b[:]) != magic {
		return fmt.Errorf("%s is not a record of ours: %w", f.Name(), errdefs.ErrFailedPrecondition)
	}
	v := func(i int) int64 { return int64(binary.LittleEndian.Uint64(b[8*i:])) }
	r.file, r.length = identity{uint64(v(1)), uint64(v(2))}, v(3)
	for i := range r.streams {
		r.streams[i] = progress{done: v(4 + 3*i), lost: lost{v(5 + 3*i), v(6 + 3*i)}}
	}
	return nil
}
