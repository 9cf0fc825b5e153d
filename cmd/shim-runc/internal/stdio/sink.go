package stdio

import (
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// The kinds of sinks beside the formats of package logsink.
const (
	sinkFIFO   = "fifo"
	sinkFile   = "file"
	sinkBinary = "binary"
	sinkNull   = "null" // the container has /dev/null
	sinkRing   = "ring" // nobody named one: the last of it is kept
)

// sink is where an output goes, as its URI says.
type sink struct {
	stream, uri, kind string
	url               *url.URL // of a URI, else nil
}

// none says that the stream is not ours to carry.
func (k sink) none() bool { return k.kind == sinkNull }

// sinkOf says where an output goes. What is wrong with a URI is said when it is opened.
func (s *Streams) sinkOf(stream string) sink {
	uri, other := s.cfg.Stdout, s.cfg.Stderr
	if stream == "stderr" {
		uri, other = other, uri
	}
	k := sink{stream: stream, uri: uri, kind: sinkFIFO}
	switch {
	case uri == "" && (other == "" || s.cfg.Terminal) && s.cfg.Ring > 0:
		k.kind = sinkRing
	case uri == "" || uri == os.DevNull:
		k.kind = sinkNull
	case strings.Contains(uri, "://"):
		u, err := url.Parse(uri)
		if err != nil {
			return k // resolve says so
		}
		k.url = u
		switch {
		case u.Scheme == sinkFile && u.Path == os.DevNull, u.Scheme == sinkNull && u.Host == "" && u.Path == "":
			k.kind = sinkNull
		case u.Scheme == sinkFile, u.Scheme == sinkBinary, logsink.Known(u.Scheme):
			k.kind = u.Scheme
		}
	}
	if k.kind == sinkNull && s.cfg.Restored { // it may have a FIFO already
		k.kind, k.uri = sinkFile, os.DevNull
	}
	return k
}

// client is the client's side of a stream: a path, and what is there.
type client struct {
	path   string
	fifo   bool
	make   bool // a file that is made if it is not there
	device bool // neither a FIFO nor a regular file
}

// resolve says what a stream that the client named is; nothing is opened.
func resolve(uri, stream string) (client, error) {
	fail := func(err error) (client, error) {
		return client{}, fmt.Errorf("cannot use %s %q: %w", stream, uri, err)
	}
	c := client{path: uri}
	if strings.Contains(uri, "://") {
		u, err := url.Parse(uri)
		if err != nil {
			return fail(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
		}
		c.path = u.Path
		switch u.Scheme {
		case sinkFIFO:
		case sinkFile:
			c.make = true
			if u.Host != "" && u.Host != "localhost" {
				return fail(fmt.Errorf("%q is a host, write file:///path: %w", u.Host, errdefs.ErrInvalidArgument))
			}
		case sinkNull:
			return fail(fmt.Errorf("null:// has neither host nor path: %w", errdefs.ErrInvalidArgument))
		default:
			return fail(fmt.Errorf("scheme %q is not supported, use a path, fifo://, file://, json-file://, cri://, binary:// or null://: %w", u.Scheme, errdefs.ErrNotImplemented))
		}
	}
	if !filepath.IsAbs(c.path) {
		return fail(fmt.Errorf("not an absolute path: %w", errdefs.ErrInvalidArgument))
	}
	fi, err := statWithin(c.path, statMost)
	switch {
	case errdefs.IsUnavailable(err):
		return fail(err)
	case err == nil:
		if c.fifo = fi.Mode()&fs.ModeNamedPipe != 0; c.fifo {
			c.make = false
		}
		c.device = !c.fifo && !fi.Mode().IsRegular()
		if fi.IsDir() {
			return fail(fmt.Errorf("a directory: %w", errdefs.ErrInvalidArgument))
		}
	case !c.make:
		return fail(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
	}
	if stream == "stdin" && !c.fifo {
		return fail(fmt.Errorf("input can only come from a FIFO: %w", errdefs.ErrInvalidArgument))
	}
	return c, nil
}

// statMost is how long a file system may take to say what a stream is.
const statMost = 10 * time.Second

// statWithin is os.Stat, or Unavailable when the file system does not answer in time.
func statWithin(path string, most time.Duration) (fs.FileInfo, error) {
	type answer struct {
		fi  fs.FileInfo
		err error
	}
	got := make(chan answer, 1)
	go func() {
		fi, err := os.Stat(path)
		got <- answer{fi, err}
	}()
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case a := <-got:
		return a.fi, a.err
	case <-timer.C:
		return nil, fmt.Errorf("its file system has not answered for %v, is its server there?: %w", most, errdefs.ErrUnavailable)
	}
}

// openClient opens a FIFO of the client, or a device.
func openClient(c client, k sink) (f *os.File, err error) {
	if c.fifo {
		f, err = openRaw(c.path, unix.O_RDWR|unix.O_NONBLOCK)
	} else {
		f, err = openNamed(c.path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s %q: %w", k.stream, k.uri, err)
	}
	return f, nil
}

// quiet gives f without Go's poller, which would wake up whenever somebody else reads or writes. It closes f.
func quiet(f *os.File) (*os.File, error) {
	defer func() { _ = f.Close() }()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
