package fdtable

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/test/hungfs"
)

func TestMain(m *testing.M) {
	hungfs.Run()
	os.Exit(m.Run())
}

func makeTable(t *testing.T) *Table {
	t.Helper()
	table, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// TestFork: a program is executed while a file is open whose file system does not answer.
func TestFork(t *testing.T) {
	hung := hungfs.Mount(t)
	table := makeTable(t)
	defer table.Close()
	f, err := table.Open(filepath.Join(hung.Dir, "file"), unix.O_CREAT|unix.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte("text")); err != nil {
		t.Fatal(err)
	}
	hung.Hang(t, true)
	done := make(chan error, 1)
	go func() { done <- exec.Command("true").Run() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the exec waits for the file system")
	}
	hung.Hang(t, false)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// TestTable: what is open in a table is in no other, the runtime can do in its thread what it may do in any, and the thread ends
// with the last file.
func TestTable(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	table := makeTable(t)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || len(b) > 0 { // would wait, if the table had the other end
		t.Errorf("%q, %v", b, err)
	}
	_ = r.Close()
	path := filepath.Join(t.TempDir(), "file")
	f, err := table.Open(path, unix.O_CREAT|unix.O_RDWR|unix.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.fd)); link == path {
		t.Errorf("%s is in the process's table, %v", path, err)
	}
	var calls sync.WaitGroup
	for range 20 {
		calls.Go(func() {
			table.Do(runtime.GC)
			table.Do(func() { time.AfterFunc(time.Hour, func() {}).Stop() })
			if _, err := f.Write([]byte("0123456789")); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	again, err := f.Again()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 201)
	if n, err := again.ReadAt(b, 0); n != 200 || err != io.EOF {
		t.Errorf("%d bytes, %v", n, err)
	}
	if err := f.Truncate(10); err != nil {
		t.Error(err)
	}
	if st, err := again.Stat(); err != nil || st.Size != 10 {
		t.Errorf("%d bytes, %v", st.Size, err)
	}
	thread := fmt.Sprintf("/proc/self/task/%d", table.tid)
	if _, err := os.Stat(thread); err != nil {
		t.Error(err)
	}
	table.Close()
	for _, f := range []*File{f, again} {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(thread); os.IsNotExist(err) {
			break
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatal("the thread does not end")
		}
	}
}

// TestClear: nothing is open any more, whoever has a file is told, and others can be opened.
func TestClear(t *testing.T) {
	table := makeTable(t)
	defer table.Close()
	path := filepath.Join(t.TempDir(), "file")
	f, err := table.Open(path, unix.O_CREAT|unix.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	table.Clear()
	if link, err := os.Readlink(table.path(f.fd)); err == nil {
		t.Errorf("%s is open", link)
	}
	_, rerr := f.ReadAt(make([]byte, 1), 0)
	_, werr := f.Write([]byte("x"))
	_, _, aerr := f.WriteAfter(0, []byte("x"))
	_, serr := f.Stat()
	for what, err := range map[string]error{"read": rerr, "write": werr, "write after": aerr, "stat": serr, "truncate": f.Truncate(0)} {
		if !errors.Is(err, ErrCleared) {
			t.Errorf("%s: %v", what, err)
		}
	}
	other, err := table.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil { // its number is the other's by now
		t.Error(err)
	}
	if _, err := other.Stat(); err != nil {
		t.Error(err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
}

// TestOwn: without a table a file is one of the process's own.
func TestOwn(t *testing.T) {
	var table *Table
	path := filepath.Join(t.TempDir(), "file")
	f, err := table.Open(path, unix.O_CREAT|unix.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.fd)); link != path {
		t.Errorf("%q, %v", link, err)
	}
	again, err := f.Again()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*File{f, again} {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := table.Open(filepath.Join(path, "none"), unix.O_RDONLY, 0); err == nil {
		t.Error("no error")
	}
	table.Close()
}
