// Package boltfile reads a bbolt database page by page and trusts nothing that it reads: it says what is damaged and gives
// all that is not. bbolt itself panics, reads beyond the end of the file or goes round in circles on such pages, so it is
// asked only once this package has found nothing. The format is bbolt's, version 2: https://github.com/etcd-io/bbolt
// (internal/common), in the byte order of the machine.
package boltfile

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"slices"
)

// What a page's flags say it is, and that a leaf's element is a bucket.
const (
	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10

	bucketElement = 0x01
)

const (
	headerSize  = 16 // id, flags, count, overflow
	elementSize = 16
	bucketSize  = 16 // root page, sequence
	metaSize    = 64
	magic       = 0xED0CDAED
	version     = 2
	noFreelist  = ^uint64(0)
	minPage     = 512
	maxPage     = 64 << 10
	maxDepth    = 64 // of pages, from the root; a tree of 2^64 records is not as deep
)

var native = binary.NativeEndian

// File is an open database. The caller closes it.
type File struct {
	f    *os.File
	size int64
}

// Open opens the file at path for reading.
func Open(path string) (*File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &File{f, fi.Size()}, nil
}

// Close closes the file.
func (f *File) Close() error { return f.f.Close() }

// Size is the file's, in bytes.
func (f *File) Size() int64 { return f.size }

// Root is where one version of the database begins. A file has the last two, as long as both their meta pages are whole.
type Root struct {
	Page     uint64
	TxID     uint64 // number of the transaction that wrote it; 0 when no meta page says
	pageSize int64
	freelist uint64
	high     uint64 // number of pages that the file is to have
}

// Metas gives the versions that whole meta pages name, the newest first.
func (f *File) Metas() []Root {
	var out []Root
	first, ok := f.meta(0)
	if ok {
		out = append(out, first)
	}
	for size := int64(minPage); size <= maxPage; size *= 2 { // without the first, nobody says where the second is
		if ok && size != first.pageSize {
			continue
		}
		if r, found := f.meta(size); found && r.pageSize == size {
			out = append(out, r)
			break
		}
	}
	slices.SortFunc(out, func(a, b Root) int {
		if a.TxID > b.TxID {
			return -1
		}
		return 1
	})
	return out
}

func (f *File) meta(at int64) (Root, bool) {
	buf := make([]byte, headerSize+metaSize)
	if _, err := f.f.ReadAt(buf, at); err != nil {
		return Root{}, false
	}
	m := buf[headerSize:]
	h := fnv.New64a()
	_, _ = h.Write(m[:metaSize-8])
	if native.Uint32(m) != magic || native.Uint32(m[4:]) != version || native.Uint64(m[56:]) != h.Sum64() {
		return Root{}, false
	}
	r := Root{
		pageSize: int64(native.Uint32(m[8:])), Page: native.Uint64(m[16:]), freelist: native.Uint64(m[32:]),
		high: native.Uint64(m[40:]), TxID: native.Uint64(m[48:]),
	}
	return r, r.pageSize >= minPage && r.pageSize <= maxPage && r.pageSize&(r.pageSize-1) == 0
}

// Search looks through all pages for such as may be the root of a database whose top has a bucket of this name. It is for
// files without a whole meta page; older versions that were not written over are found too.
func (f *File) Search(name string) []Root {
	var out []Root
	sizes := []int64{int64(os.Getpagesize())}
	for size := int64(1024); size <= maxPage; size *= 2 {
		if size != sizes[0] {
			sizes = append(sizes, size)
		}
	}
	for _, size := range sizes {
		high := uint64(f.size / size)
		for id := uint64(2); id < high; id++ {
			r := Root{Page: id, pageSize: size, high: high, freelist: noFreelist}
			p, err := f.page(r, id)
			if err != nil || p.flags != leafPage {
				continue
			}
			for i := range p.count {
				if e, err := p.leaf(i); err == nil && e.bucket && string(e.key) == name {
					out = append(out, r)
				}
			}
		}
		if len(out) > 0 {
			break // a database has one size of page
		}
	}
	return out
}

type page struct {
	flags uint16
	count int
	data  []byte // with the header
	at    uint64

	end   int64 // where the keys and values of the element read last end
	ended int   // which one that was
}

// next is where the keys and values of element i begin: behind those of the one before, as bbolt writes them. Behind an
// element that is damaged nobody knows, and what it says itself is believed.
func (p *page) next(i int) int64 {
	switch first := headerSize + int64(p.count)*elementSize; {
	case i == 0:
		return first
	case p.end != 0 && p.ended == i-1:
		return p.end
	default:
		h := p.data[headerSize+i*elementSize:]
		pos := int64(native.Uint32(h))
		if p.flags == leafPage {
			pos = int64(native.Uint32(h[4:]))
		}
		return max(first, headerSize+int64(i)*elementSize+pos)
	}
}

func (f *File) page(r Root, id uint64) (*page, error) {
	if id < 2 || id >= r.high {
		return nil, fmt.Errorf("there is no page %d", id)
	}
	buf := make([]byte, r.pageSize)
	if _, err := f.f.ReadAt(buf, int64(id)*r.pageSize); err != nil {
		return nil, fmt.Errorf("page %d cannot be read: %w", id, short(err))
	}
	if got := native.Uint64(buf); got != id {
		return nil, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	if more := uint64(native.Uint32(buf[12:])); more > 0 {
		if id+more >= r.high || id+more < id || (int64(id+more)+1)*r.pageSize > f.size {
			return nil, fmt.Errorf("page %d goes on for %d pages, beyond the end", id, more)
		}
		rest := make([]byte, int64(more)*r.pageSize)
		if _, err := f.f.ReadAt(rest, int64(id+1)*r.pageSize); err != nil {
			return nil, fmt.Errorf("page %d cannot be read: %w", id, short(err))
		}
		buf = append(buf, rest...)
	}
	return parse(buf, id)
}

func short(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parse reads the header of a page, which may stand in a bucket's value.
func parse(buf []byte, id uint64) (*page, error) {
	if len(buf) < headerSize {
		return nil, fmt.Errorf("page %d has %d bytes", id, len(buf))
	}
	p := &page{flags: native.Uint16(buf[8:]), count: int(native.Uint16(buf[10:])), data: buf, at: id}
	switch p.flags {
	case branchPage, leafPage:
		if headerSize+p.count*elementSize > len(buf) {
			return nil, fmt.Errorf("page %d has room for fewer than %d elements", id, p.count)
		}
	case freelistPage:
	default:
		return nil, fmt.Errorf("page %d is of no known kind (%#x)", id, p.flags)
	}
	return p, nil
}

type element struct {
	key, value []byte
	bucket     bool
	child      uint64 // of a branch
}

func (p *page) leaf(i int) (e element, err error) {
	at := headerSize + i*elementSize
	h := p.data[at:]
	flags, pos, ksize, vsize := native.Uint32(h), int64(native.Uint32(h[4:])), int64(native.Uint32(h[8:])), int64(native.Uint32(h[12:]))
	begin := int64(at) + pos
	if flags > bucketElement || begin != p.next(i) || begin+ksize+vsize > int64(len(p.data)) {
		return e, fmt.Errorf("element %d of page %d is not where it must be", i, p.at)
	}
	p.end, p.ended = begin+ksize+vsize, i
	e.key, e.value, e.bucket = p.data[begin:begin+ksize], p.data[begin+ksize:begin+ksize+vsize], flags == bucketElement
	return e, nil
}

func (p *page) branch(i int) (e element, err error) {
	at := headerSize + i*elementSize
	h := p.data[at:]
	begin, ksize := int64(at)+int64(native.Uint32(h)), int64(native.Uint32(h[4:]))
	if begin != p.next(i) || begin+ksize > int64(len(p.data)) {
		return e, fmt.Errorf("element %d of page %d is not where it must be", i, p.at)
	}
	p.end, p.ended = begin+ksize, i
	e.key, e.child = p.data[begin:begin+ksize], native.Uint64(h[8:])
	return e, nil
}

// inRange says whether key is at least low and below high; nil is no limit.
func inRange(key, low, high []byte) bool {
	return (low == nil || bytes.Compare(key, low) >= 0) && (high == nil || bytes.Compare(key, high) < 0)
}
