// Package hungfs is a file system that can be made to stop answering, as a network's does whose server is away: for tests
// of those who write to it.
package hungfs

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// verb is the first argument of a test binary that is to be the file system.
const verb = "test-hungfs"

// FS is one that is mounted. Its files are in the memory of a process of its own.
type FS struct {
	Dir string // where
	cmd *exec.Cmd
}

// Run is the file system, and does not return, if that is what this process is: a TestMain begins with it.
func Run() {
	if len(os.Args) != 3 || os.Args[1] != verb {
		return
	}
	server, err := fs.Mount(os.Args[2], &dir{}, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, Name: "hungfs"}})
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("ready")
	server.Wait()
	os.Exit(0)
}

// Mount mounts one for a test, whose end unmounts it: who waits for it then gets an error.
func Mount(t testing.TB) *FS {
	t.Helper()
	f := &FS{Dir: t.TempDir()}
	f.cmd = exec.Command("/proc/self/exe", verb, f.Dir)
	f.cmd.Stderr = os.Stderr
	out, err := f.cmd.StdoutPipe()
	if err == nil {
		err = f.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.cmd.Process.Kill() // the kernel then ends what waits for it
		_ = f.cmd.Wait()
		if err := syscall.Unmount(f.Dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", f.Dir, err)
		}
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("cannot mount a file system (fuse): %v", err)
	}
	return f
}

// Hang stops it from answering, or lets it answer again.
func (f *FS) Hang(t testing.TB, hung bool) {
	t.Helper()
	sig := syscall.SIGCONT
	if hung {
		sig = syscall.SIGSTOP
	}
	if err := f.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

type dir struct{ fs.Inode }

var _ = fs.NodeCreater((*dir)(nil))

// Create makes a file.
func (d *dir) Create(ctx context.Context, name string, _, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	f := &fs.MemRegularFile{Attr: fuse.Attr{Mode: syscall.S_IFREG | mode&0o777}}
	child := d.NewInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG})
	out.Attr = f.Attr
	return child, nil, 0, 0
}
