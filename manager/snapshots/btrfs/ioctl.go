package btrfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of ioctl_btrfs, from linux/btrfs.h.
const (
	subvolCreate   = 0x5000940e // BTRFS_IOC_SUBVOL_CREATE
	snapDestroy    = 0x5000940f // BTRFS_IOC_SNAP_DESTROY
	inoLookup      = 0xd0009412 // BTRFS_IOC_INO_LOOKUP
	snapCreateV2   = 0x50009417 // BTRFS_IOC_SNAP_CREATE_V2
	subvolGetFlags = 0x80089419 // BTRFS_IOC_SUBVOL_GETFLAGS
	subvolSetFlags = 0x4008941a // BTRFS_IOC_SUBVOL_SETFLAGS

	flagReadOnly = 1 << 1 // BTRFS_SUBVOL_RDONLY
	firstInode   = 256    // BTRFS_FIRST_FREE_OBJECTID: the root directory of each subvolume
)

// volArgs is struct btrfs_ioctl_vol_args.
type volArgs struct {
	_    int64 // fd
	name [4088]byte
}

// volArgsV2 is struct btrfs_ioctl_vol_args_v2.
type volArgsV2 struct {
	fd    int64
	_     uint64 // transid
	flags uint64
	_     [4]uint64
	name  [4040]byte
}

// lookupArgs is struct btrfs_ioctl_ino_lookup_args.
type lookupArgs struct {
	treeID   uint64
	objectID uint64
	_        [4080]byte // name
}

func ioctl[T any](dir string, request uintptr, name string, arg *T) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return fmt.Errorf("%s: %w", dir, os.NewSyscallError(name, errno))
	}
	return nil
}

// create makes an empty subvolume.
func create(path string) error {
	var a volArgs
	copy(a.name[:len(a.name)-1], filepath.Base(path))
	return ioctl(filepath.Dir(path), subvolCreate, "BTRFS_IOC_SUBVOL_CREATE", &a)
}

// snapshot makes a subvolume that shares everything with parent.
func snapshot(path, parent string, readonly bool) error {
	f, err := os.Open(parent)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	a := volArgsV2{fd: int64(f.Fd())}
	if readonly {
		a.flags = flagReadOnly
	}
	copy(a.name[:len(a.name)-1], filepath.Base(path))
	return ioctl(filepath.Dir(path), snapCreateV2, "BTRFS_IOC_SNAP_CREATE_V2", &a)
}

// setReadOnly says whether a subvolume can be written.
func setReadOnly(path string, readonly bool) error {
	var now uint64
	if err := ioctl(path, subvolGetFlags, "BTRFS_IOC_SUBVOL_GETFLAGS", &now); err != nil {
		return err
	}
	want := now &^ flagReadOnly
	if readonly {
		want |= flagReadOnly
	}
	if want == now {
		return nil
	}
	return ioctl(path, subvolSetFlags, "BTRFS_IOC_SUBVOL_SETFLAGS", &want)
}

// subvolID is the number that the mount option subvolid takes.
func subvolID(path string) (uint64, error) {
	a := lookupArgs{objectID: firstInode}
	err := ioctl(path, inoLookup, "BTRFS_IOC_INO_LOOKUP", &a)
	return a.treeID, err
}

func isSubvolume(path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st.Ino == firstInode && st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// destroy deletes a subvolume, with those that a container has made in it. None there is no error.
func destroy(path string) error {
	err := destroyThere(path)
	if errors.Is(err, fs.ErrNotExist) { // somebody else was faster, or was there before
		return nil
	}
	return err
}

func destroyThere(path string) error {
	is, err := isSubvolume(path)
	if err != nil {
		return err
	}
	if !is {
		return os.RemoveAll(path)
	}
	var a volArgs
	copy(a.name[:len(a.name)-1], filepath.Base(path))
	err = ioctl(filepath.Dir(path), snapDestroy, "BTRFS_IOC_SNAP_DESTROY", &a)
	if !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	err = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == path || !d.IsDir() {
			return err
		}
		nested, err := isSubvolume(p)
		if err != nil || !nested {
			return err
		}
		if err := destroy(p); err != nil {
			return err
		}
		return fs.SkipDir
	})
	if err != nil {
		return err
	}
	return ioctl(filepath.Dir(path), snapDestroy, "BTRFS_IOC_SNAP_DESTROY", &a)
}
