// Package hungfs is a file system that can be made to stop answering, as a network's does whose server is away: for tests
// of those who write to it.
package hungfs

import (
	"context"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// FS is one that is mounted. Its files are in memory.
type FS struct {
	Dir string // where

	mu   sync.Mutex
	wake sync.Cond // of mu
	hung bool
	held int // writes that wait
}

// Mount mounts one for a test, whose end lets it answer and unmounts it.
func Mount(t testing.TB) *FS {
	t.Helper()
	f := &FS{Dir: t.TempDir()}
	f.wake.L = &f.mu
	server, err := fs.Mount(f.Dir, &dir{fs: f}, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, Name: "hungfs"}})
	if err != nil {
		t.Fatalf("cannot mount a file system of this process (fuse): %v", err)
	}
	t.Cleanup(func() {
		f.Hang(false)
		if err := server.Unmount(); err != nil {
			_ = syscall.Unmount(f.Dir, syscall.MNT_DETACH|syscall.MNT_FORCE)
			t.Errorf("unmount: %v", err)
		}
		server.Wait()
	})
	return f
}

// Hang stops it from answering writes, or lets it answer again.
func (f *FS) Hang(hung bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hung = hung
	f.wake.Broadcast()
}

// Held is how many writes wait for an answer.
func (f *FS) Held() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held
}

func (f *FS) wait() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held++
	for f.hung {
		f.wake.Wait()
	}
	f.held--
}

type dir struct {
	fs.Inode
	fs *FS
}

var _ = fs.NodeCreater((*dir)(nil))

// Create makes a file.
func (d *dir) Create(ctx context.Context, name string, _, _ uint32, _ *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	child := d.NewInode(ctx, &file{fs: d.fs}, fs.StableAttr{Mode: syscall.S_IFREG})
	d.AddChild(name, child, true)
	return child, nil, 0, 0
}

type file struct {
	fs.MemRegularFile
	fs *FS
}

// Write waits while the file system hangs.
func (f *file) Write(ctx context.Context, h fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	f.fs.wait()
	return f.MemRegularFile.Write(ctx, h, data, off)
}
