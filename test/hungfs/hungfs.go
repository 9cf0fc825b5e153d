// Package hungfs is a file system that can be made to stop answering, as a network's does whose server is away: for tests
// of those who use it.
package hungfs

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// verb is the first argument of a test binary that is to be the file system.
const verb = "test-hungfs"

// FS is one that is mounted, by a process of its own.
type FS struct {
	Dir string // where
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
}

// Run is the file system, and does not return, if that is what this process is: a TestMain begins with it.
func Run() {
	if len(os.Args) != 4 || os.Args[1] != verb {
		return
	}
	if err := serve(os.Args[2], os.Args[3]); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serve mounts one at path: the files in a directory, or, without one, files in memory. Each line of standard input changes
// whether it answers, and is answered by one.
func serve(path, backing string) error {
	var root fs.InodeEmbedder = &dir{}
	if backing != "" {
		var err error
		if root, err = fs.NewLoopbackRoot(backing); err != nil {
			return err
		}
	}
	t := newTap(fs.NewNodeFS(root, &fs.Options{}))
	server, err := fuse.NewServer(t, path, &fuse.MountOptions{DirectMountStrict: true, Name: "hungfs"})
	if err != nil {
		return err
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return err
	}
	go func() {
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
			t.turn(s.Text() == stall)
			fmt.Println("done")
		}
	}()
	fmt.Println("ready")
	server.Wait()
	return nil
}

// Mount mounts one for a test, whose files are in memory. The end of the test unmounts it: who waits for it then gets an error.
func Mount(t testing.TB) *FS { return Over(t, "") }

// Over is Mount of one that shows what is in the directory backing.
func Over(t testing.TB, backing string) *FS {
	t.Helper()
	f := &FS{Dir: t.TempDir()}
	f.cmd = exec.Command("/proc/self/exe", verb, f.Dir, backing)
	f.cmd.Stderr = os.Stderr
	out, err := f.cmd.StdoutPipe()
	if err == nil {
		if f.in, err = f.cmd.StdinPipe(); err == nil {
			err = f.cmd.Start()
		}
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
	f.out = bufio.NewReader(out)
	if _, err := f.out.ReadString('\n'); err != nil {
		t.Fatalf("cannot mount a file system (fuse): %v", err)
	}
	return f
}

// Hang stops it from answering, or lets it answer again. Who waits for an answer to what it has not taken yet can be killed.
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

const stall, flow = "stall", "flow"

// Stall has it take requests and not answer them, or answer all of them. Who waits for the answer to what it has taken is in
// uninterruptible sleep (D), and no signal ends it.
func (f *FS) Stall(t testing.TB, stalled bool) {
	t.Helper()
	word := flow
	if stalled {
		word = stall
	}
	_, err := fmt.Fprintln(f.in, word)
	if err == nil {
		_, err = f.out.ReadString('\n')
	}
	if err != nil {
		t.Fatalf("cannot %s: %v", word, err)
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
