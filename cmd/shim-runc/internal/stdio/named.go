package stdio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// named is a file to which output is appended, and which is opened by its path: at first, and again when somebody has moved
// it away.
type named struct {
	uri, stream string
	path        string
	anew        atomic.Pointer[reopening]        // somebody waits for that
	at          atomic.Pointer[logsink.Position] // the file that is open; nil before
	over        chan struct{}                    // closed when nothing is written any more
}

// reopening is one request to open the file anew.
type reopening struct {
	done chan struct{}
	err  error // set before done is closed
}

func newNamed(uri, stream, path string) *named {
	return &named{uri: uri, stream: stream, path: path, over: make(chan struct{})}
}

func (n *named) asked() bool { return n != nil && n.anew.Load() != nil }

// openFile opens the file; while that fails output waits for it.
func (o *output) openFile() error {
	for wait := firstWait; ; {
		var f *os.File
		var err error
		o.stall.during(func() { f, _, err = openClient(o.named.uri, o.named.stream) })
		if err == nil {
			o.dst = f
			o.prepare()
			o.stall.goes()
			return nil
		}
		o.stall.waits(cause(err))
		if err := o.pause(&wait); err != nil {
			return err
		}
	}
}

// reopenFile does what was asked for. When it fails the file stays the one that it was.
func (o *output) reopenFile() {
	r := o.named.anew.Load()
	var f *os.File
	o.stall.during(func() {
		if f, _, r.err = openClient(o.named.uri, o.named.stream); r.err == nil {
			_ = o.dst.Close()
		}
	})
	if r.err == nil {
		o.dst = f
		o.prepare()
	}
	o.named.anew.Store(nil)
	close(r.done)
}

// reopen has the file at the path opened anew, and returns when nothing more goes into the old one.
func (o *output) reopen(ctx context.Context) (string, error) {
	if o.named == nil {
		return "", nil
	}
	r := &reopening{done: make(chan struct{})}
	for !o.named.anew.CompareAndSwap(nil, r) {
		if other := o.named.anew.Load(); other != nil { // it may be past the opening already
			select {
			case <-other.done:
			case <-o.named.over:
				return "", nil
			case <-ctx.Done():
				return "", o.notReopened(ctx)
			}
		}
	}
	_ = o.src.SetReadDeadline(past)
	select {
	case <-r.done:
		return o.named.path, r.err
	case <-o.named.over:
		return "", nil
	case <-ctx.Done():
		return "", o.notReopened(ctx)
	}
}

func (o *output) notReopened(ctx context.Context) error {
	why, _ := o.stall.get()
	if why == "" {
		why = "it is being written"
	}
	return fmt.Errorf("cannot reopen %s: %s: %w", o.named.path, why, ctx.Err())
}

// openNamed opens a file to which output is appended; it is made if it is not there, and so are the directories above it.
func openNamed(path string) (*os.File, error) {
	// O_NONBLOCK: to open what turns out to be a FIFO must not wait.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o644)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("a FIFO that nobody reads; name a FIFO without a scheme: %w", err)
	}
	return f, err
}
