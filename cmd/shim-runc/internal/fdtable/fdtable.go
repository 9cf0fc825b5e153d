// Package fdtable keeps files out of the process's table of file descriptors, in the table of one thread.
//
// A fork copies the table of the thread that forks, and the copies are closed when the new program is executed. A file
// system may have to be asked for that (flush in fuse(4), a write-back in NFS), and the exec waits until it answers. So a
// file whose file system may not answer must not be in the table that is copied.
package fdtable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Table is a table of file descriptors and the thread that has it. A nil Table is the process's own: what it is to do is
// done by the caller. Whoever made it and each file that is open in it share it: the last to be closed ends the thread.
type Table struct {
	calls chan func()
	tid   int
	open  map[*File]struct{} // of the table's thread

	mu    sync.Mutex
	users int
}

// New makes an empty table, to be closed with Close.
func New() (*Table, error) {
	// The runtime's poller must be there already: a thread that stops the world for a collection looks into it, so its
	// descriptors are those that every table has to have.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_, _ = r.Close(), w.Close()
	t := &Table{calls: make(chan func()), open: map[*File]struct{}{}, users: 1}
	made := make(chan error)
	go t.run(made)
	if err := <-made; err != nil {
		return nil, fmt.Errorf("cannot make a thread with files of its own: %w", err)
	}
	return t, nil
}

func (t *Table) run(made chan<- error) {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	t.tid = unix.Gettid()
	if t.tid == unix.Getpid() {
		// The first thread's table is what the process's is taken for. It never ends, so it is given back, once another
		// thread has been found.
		other := make(chan error)
		go t.run(other)
		made <- <-other
		runtime.UnlockOSThread()
		return
	}
	err := unix.Unshare(unix.CLONE_FILES)
	if err == nil {
		err = empty()
	}
	made <- err
	if err != nil {
		return
	}
	for call := range t.calls {
		call()
	}
}

// empty closes all descriptors of the calling thread's table, but for those that the runtime may use in any thread.
func empty() error {
	const dir = "/proc/thread-self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil { // the one of ReadDir itself
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil || link == "anon_inode:[eventpoll]" || link == "anon_inode:[eventfd]" {
			continue
		}
		_ = unix.Close(fd)
	}
	return nil
}

// Do runs f in the table's thread, after what was asked before, and returns when f has. f must not use a file that was opened
// elsewhere.
func (t *Table) Do(f func()) {
	if t == nil {
		f()
		return
	}
	done := make(chan struct{})
	t.calls <- func() {
		defer close(done)
		f()
	}
	<-done
}

// ErrCleared is what a file answers that Clear has closed.
var ErrCleared = errors.New("its table of descriptors was cleared")

// Clear closes all files that are open in the table, when what was asked before is done. Those who have them are to Close them
// all the same, and can open others.
func (t *Table) Clear() {
	t.Do(func() {
		for f := range t.open {
			_ = f.close()
		}
	})
}

// path names a descriptor of the table to whoever opens it again.
func (t *Table) path(fd int) string {
	if t == nil {
		return fmt.Sprintf("/proc/self/fd/%d", fd)
	}
	return fmt.Sprintf("/proc/self/task/%d/fd/%d", t.tid, fd)
}

// Hold makes one more of those who are to Close the table.
func (t *Table) Hold() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.users++
}

// Close lets go of the table. It does not wait.
func (t *Table) Close() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.users--; t.users == 0 {
		close(t.calls)
	}
}
