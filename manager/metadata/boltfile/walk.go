package boltfile

import (
	"bytes"
	"fmt"
)

// Damage is one thing that cannot be read, or that contradicts the rest.
type Damage struct {
	Bucket []string // the names that lead to the bucket; none: the top, or what belongs to no bucket
	Reason string
	Lost   bool // there are records of the bucket, or of one below it, that nobody was told of
}

func (d Damage) String() string {
	if len(d.Bucket) == 0 {
		return d.Reason
	}
	return fmt.Sprintf("bucket %q: %s", d.Bucket, d.Reason)
}

// Visitor is told what is read, a bucket before what is in it. What it is given it may keep, and must not change.
type Visitor interface {
	Bucket(path []string, sequence uint64)
	Record(path []string, key, value []byte)
}

type walk struct {
	f      *File
	r      Root
	v      Visitor
	seen   map[uint64]bool
	damage []Damage
}

// Walk reads the version of the database that begins at r: all that can be read goes to v (nil: nobody), the rest is
// returned. Without damage bbolt can work with the file, and may write to it.
func (f *File) Walk(r Root, v Visitor) []Damage {
	w := &walk{f: f, r: r, v: v, seen: map[uint64]bool{0: true, 1: true}}
	if want := int64(r.high) * r.pageSize; f.size < want {
		w.amiss(fmt.Errorf("the file has %d bytes, of at least %d", f.size, want))
	}
	w.node(nil, r.Page, nil, nil, 0)
	w.freelist()
	return w.damage
}

// bad enters damage that hides records; amiss such as does not.
func (w *walk) bad(path []string, err error) {
	w.damage = append(w.damage, Damage{Bucket: path, Reason: err.Error(), Lost: true})
}

func (w *walk) amiss(err error) { w.damage = append(w.damage, Damage{Reason: err.Error()}) }

// node reads a page of the bucket at path and all below it, whose keys are at least low and below high.
func (w *walk) node(path []string, id uint64, low, high []byte, depth int) {
	p, err := w.f.page(w.r, id)
	if err == nil && p.flags == freelistPage {
		err = fmt.Errorf("page %d is a list of free pages", id)
	}
	if err == nil && depth > maxDepth {
		err = fmt.Errorf("page %d is too deep", id)
	}
	if err != nil {
		w.bad(path, err)
		return
	}
	for n := id; n < id+uint64(int64(len(p.data))/w.r.pageSize); n++ {
		if w.seen[n] {
			w.bad(path, fmt.Errorf("page %d is used twice", n))
			return
		}
		w.seen[n] = true
	}
	w.elements(path, p, low, high, depth)
}

func (w *walk) elements(path []string, p *page, low, high []byte, depth int) {
	if p.flags == branchPage {
		w.branches(path, p, low, high, depth)
		return
	}
	var last []byte
	for i := range p.count {
		e, err := p.leaf(i)
		if err == nil && (last != nil && bytes.Compare(e.key, last) <= 0 || !inRange(e.key, low, high)) {
			err = fmt.Errorf("key %d of page %d is not in order", i, p.at)
		}
		if err == nil && len(e.key) == 0 {
			err = fmt.Errorf("key %d of page %d is empty", i, p.at)
		}
		if err != nil {
			w.bad(path, err)
			continue
		}
		last = e.key
		if e.bucket {
			w.bucket(append(path[:len(path):len(path)], string(e.key)), e.value, p.at, depth)
		} else if w.v != nil {
			w.v.Record(path, e.key, e.value)
		}
	}
}

func (w *walk) branches(path []string, p *page, low, high []byte, depth int) {
	elements := make([]element, 0, p.count)
	for i := range p.count {
		e, err := p.branch(i)
		if n := len(elements); err == nil && (n > 0 && bytes.Compare(e.key, elements[n-1].key) <= 0 || !inRange(e.key, low, high)) {
			err = fmt.Errorf("key %d of page %d is not in order", i, p.at)
		}
		if err != nil {
			w.bad(path, err)
			continue
		}
		elements = append(elements, e)
	}
	if p.count == 0 {
		w.bad(path, fmt.Errorf("page %d leads nowhere", p.at))
	}
	for i, e := range elements {
		top := high
		if i+1 < len(elements) {
			top = elements[i+1].key
		}
		w.node(path, e.child, e.key, top, depth+1)
	}
}

// bucket reads what is in a bucket: on pages of its own, or in value itself.
func (w *walk) bucket(path []string, value []byte, at uint64, depth int) {
	if len(value) < bucketSize {
		w.bad(path[:len(path)-1], fmt.Errorf("the root of %q has %d bytes", path[len(path)-1], len(value)))
		return
	}
	root, sequence := native.Uint64(value), native.Uint64(value[8:])
	if w.v != nil {
		w.v.Bucket(path, sequence)
	}
	if root != 0 {
		w.node(path, root, nil, nil, depth+1)
		return
	}
	p, err := parse(value[bucketSize:], at)
	if err == nil && p.flags != leafPage {
		err = fmt.Errorf("what stands in page %d for it is no leaf", at)
	}
	if err != nil {
		w.bad(path, err)
		return
	}
	w.elements(path, p, nil, nil, depth+1)
}

// freelist checks the list of free pages: bbolt would write over one that is in use.
func (w *walk) freelist() {
	if w.r.freelist == noFreelist {
		return
	}
	p, err := w.f.page(w.r, w.r.freelist)
	if err != nil || p.flags != freelistPage {
		w.amiss(fmt.Errorf("the list of free pages cannot be read: page %d: %w", w.r.freelist, orKind(err)))
		return
	}
	if w.seen[w.r.freelist] {
		w.amiss(fmt.Errorf("page %d, the list of free pages, is used twice", w.r.freelist))
		return
	}
	n, at := uint64(p.count), headerSize
	if p.count == 0xFFFF { // the count did not fit
		if len(p.data) < headerSize+8 {
			w.amiss(fmt.Errorf("the list of free pages is cut short"))
			return
		}
		n, at = native.Uint64(p.data[headerSize:]), headerSize+8
	}
	if n > uint64(len(p.data)-at)/8 {
		w.amiss(fmt.Errorf("the list of free pages names %d, which do not fit", n))
		return
	}
	free := make(map[uint64]bool, n)
	for i := range n {
		id := native.Uint64(p.data[at+int(i)*8:])
		if id < 2 || id >= w.r.high || w.seen[id] || free[id] || id == w.r.freelist {
			w.amiss(fmt.Errorf("the list of free pages has page %d, which is not free", id))
			return
		}
		free[id] = true
	}
}

func orKind(err error) error {
	if err == nil {
		return fmt.Errorf("it is of another kind")
	}
	return err
}
