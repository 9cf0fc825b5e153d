package hungfs

import (
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// tap is a file system whose answers can be held back.
type tap struct {
	fuse.RawFileSystem

	mu   sync.Mutex
	open chan struct{} // closed: it answers
}

func newTap(of fuse.RawFileSystem) *tap {
	t := &tap{RawFileSystem: of, open: make(chan struct{})}
	close(t.open)
	return t
}

func (t *tap) turn(off bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.open:
		if off {
			t.open = make(chan struct{})
		}
	default:
		if !off {
			close(t.open)
		}
	}
}

func (t *tap) wait() {
	t.mu.Lock()
	open := t.open
	t.mu.Unlock()
	<-open
}

func (t *tap) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	t.wait()
	return t.RawFileSystem.Lookup(cancel, h, name, out)
}

func (t *tap) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	t.wait()
	return t.RawFileSystem.GetAttr(cancel, in, out)
}

func (t *tap) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	t.wait()
	return t.RawFileSystem.Open(cancel, in, out)
}

func (t *tap) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	t.wait()
	return t.RawFileSystem.OpenDir(cancel, in, out)
}

func (t *tap) Read(cancel <-chan struct{}, in *fuse.ReadIn, b []byte) (fuse.ReadResult, fuse.Status) {
	t.wait()
	return t.RawFileSystem.Read(cancel, in, b)
}

func (t *tap) Write(cancel <-chan struct{}, in *fuse.WriteIn, b []byte) (uint32, fuse.Status) {
	t.wait()
	return t.RawFileSystem.Write(cancel, in, b)
}

func (t *tap) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	t.wait()
	return t.RawFileSystem.Flush(cancel, in)
}

func (t *tap) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	t.wait()
	return t.RawFileSystem.Create(cancel, in, name, out)
}

func (t *tap) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	t.wait()
	return t.RawFileSystem.Mkdir(cancel, in, name, out)
}
