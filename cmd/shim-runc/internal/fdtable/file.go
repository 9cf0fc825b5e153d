package fdtable

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// File is an open file. Its methods may be called in any thread, by one at a time for Write.
type File struct {
	in   *Table
	fd   int // -1: closed
	name string
}

// Open opens a file in the table, as open(2); O_CLOEXEC is added.
func (t *Table) Open(path string, flags int, mode uint32) (*File, error) {
	f := &File{in: t, fd: -1, name: path}
	var err error
	t.Do(func() {
		err = again(func() (err error) {
			f.fd, err = unix.Open(path, flags|unix.O_CLOEXEC, mode)
			return err
		})
		if err == nil && t != nil {
			t.open[f] = struct{}{}
		}
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	t.Hold()
	return f, nil
}

// Again opens the same file for reading, whatever its name is by now.
func (f *File) Again() (*File, error) { return f.in.Open(f.in.path(f.fd), unix.O_RDONLY, 0) }

// Do calls f with the file's descriptor, in its table.
func (f *File) Do(call func(fd int) error) (err error) {
	f.in.Do(func() {
		if err = f.cleared(); err == nil {
			err = again(func() error { return call(f.fd) })
		}
	})
	return err
}

func (f *File) cleared() error {
	if f.fd < 0 {
		return ErrCleared
	}
	return nil
}

// Stat is fstat(2).
func (f *File) Stat() (st unix.Stat_t, err error) {
	err = f.wrap("stat", f.Do(func(fd int) error { return unix.Fstat(fd, &st) }))
	return st, err
}

// Write implements io.Writer.
func (f *File) Write(b []byte) (n int, err error) {
	f.in.Do(func() {
		if err = f.cleared(); err == nil {
			n, err = f.write(b)
		}
	})
	return n, f.wrap("write", err)
}

// WriteAfter is Write for a file that has length bytes, or any number if that is negative. was is how many it had: if that is another
// number, nothing is written. The thread is asked once.
func (f *File) WriteAfter(length int64, b []byte) (n int, was int64, err error) {
	f.in.Do(func() {
		var st unix.Stat_t
		if err = f.cleared(); err == nil {
			err = again(func() error { return unix.Fstat(f.fd, &st) })
		}
		if err != nil {
			return
		}
		if was = st.Size; length < 0 || was == length {
			n, err = f.write(b)
		}
	})
	return n, was, f.wrap("write", err)
}

func (f *File) write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		err = again(func() error {
			m, err := unix.Write(f.fd, b[n:])
			n += max(m, 0)
			if err == nil && m == 0 {
				return io.ErrUnexpectedEOF
			}
			return err
		})
	}
	return n, err
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(b []byte, at int64) (n int, err error) {
	f.in.Do(func() {
		err = f.cleared()
		for n < len(b) && err == nil {
			err = again(func() error {
				m, err := unix.Pread(f.fd, b[n:], at+int64(n))
				n += max(m, 0)
				if err == nil && m == 0 {
					return io.EOF
				}
				return err
			})
		}
	})
	if err == io.EOF {
		return n, err
	}
	return n, f.wrap("read", err)
}

// Truncate is ftruncate(2).
func (f *File) Truncate(size int64) error {
	return f.wrap("truncate", f.Do(func(fd int) error { return unix.Ftruncate(fd, size) }))
}

// Close closes the file. It is called once.
func (f *File) Close() error {
	var err error
	f.in.Do(func() { err = f.close() })
	f.in.Close()
	return f.wrap("close", err)
}

// close is to be called in the table's thread.
func (f *File) close() error {
	if f.fd < 0 {
		return nil
	}
	if f.in != nil {
		delete(f.in.open, f)
	}
	err := unix.Close(f.fd)
	f.fd = -1
	return err
}

func (f *File) wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: f.name, Err: err}
}

// again repeats a call that a signal has interrupted.
func again(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
