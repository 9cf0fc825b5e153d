package stdio

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// named is a device that output is written to, or a file of a process whose shim did not keep a log of it yet: it is opened
// by its path, by whoever writes to it.
type named struct{ uri, stream, path string }

func newNamed(uri, stream, path string) *named { return &named{uri, stream, path} }

// openFile opens it; while that fails output waits for it.
func (o *output) openFile() error {
	for wait := firstWait; ; {
		var f *os.File
		var err error
		o.stall.during(func() { f, err = openNamed(o.named.path) })
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

func (o *output) reopen(context.Context) (string, error) { return "", nil }

// openNamed opens what output is appended to. O_NONBLOCK: to open what turns out to be a FIFO must not wait.
func openNamed(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}
