package stack

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/mount"
)

// A loop device has its owner in its name (LOOP_GET_STATUS64): managerd:STATE:STACK/N, where STATE is a hash of the path of
// the daemon's state directory. Others may have got its number since a link to it was written.
const loopPrefix = "managerd:"

func loopName(dir string, n int) string {
	return namesOf(filepath.Dir(filepath.Dir(dir))) + filepath.Base(dir) + "/" + strconv.Itoa(n)
}

func namesOf(state string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(state)))
	return loopPrefix + hex.EncodeToString(sum[:8]) + ":"
}

// leaving is how long it is waited for a device of the same file that was given back and is still used.
const leaving = 3 * time.Second

// Attach makes file the loop device that point links to. It stays, whoever dies, until Undo. FailedPrecondition when it is to
// be written to and somebody still uses an earlier device of it: two file systems would write to one file.
func Attach(dir string, n int, file string, readonly bool) (point, device string, err error) {
	if !readonly {
		if err := free(filepath.Dir(filepath.Dir(dir)), file); err != nil {
			return "", "", err
		}
	}
	f, err := mount.Attach(file, mount.Loop{ReadOnly: readonly, Direct: true, Name: loopName(dir, n)})
	if err != nil {
		return "", "", err
	}
	defer func() { _ = f.Close() }() // until it is kept, that detaches it
	point = filepath.Join(dir, strconv.Itoa(n))
	if err := os.Symlink(f.Name(), point); err != nil {
		return "", "", err
	}
	failpoint.Hit("mounts.loop.linked")
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return "", "", os.NewSyscallError("LOOP_GET_STATUS64", err)
	}
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(int(f.Fd()), info); err != nil {
		return "", "", os.NewSyscallError("LOOP_SET_STATUS64", err)
	}
	failpoint.Hit("mounts.loop.kept")
	return point, f.Name(), nil
}

// free waits until no device of file that was given back is used any more.
func free(state, file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return &os.PathError{Op: "stat", Path: file, Err: err}
	}
	for deadline := time.Now().Add(leaving); ; time.Sleep(5 * time.Millisecond) {
		used := ""
		err := each(func(device string, info *unix.LoopInfo64) {
			if strings.HasPrefix(nameOf(info), namesOf(state)) && info.Flags&unix.LO_FLAGS_AUTOCLEAR != 0 && info.Inode == st.Ino && info.Device == st.Dev {
				used = device
			}
		})
		if err != nil || used == "" {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is still mounted somewhere, as the device %s of an activation that is gone: %w", file, used, errdefs.ErrFailedPrecondition)
		}
	}
}

// detach gives a device back that has this name; what is mounted of it by others has it until it is unmounted, and what they
// have written is in the file.
func detach(device, name string) error {
	f, info, err := status(device)
	if err != nil || f == nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if nameOf(info) != name {
		return nil // by now it is somebody else's
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("cannot flush %s: %w", device, os.NewSyscallError("BLKFLSBUF", err))
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("cannot detach %s: %w", device, os.NewSyscallError("LOOP_CLR_FD", err))
	}
	return nil
}

// status opens a loop device; nil when there is none, or nothing is attached to it.
func status(device string) (*os.File, *unix.LoopInfo64, error) {
	f, err := os.Open(device)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) {
			err = nil
		}
		return nil, nil, err
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		_ = f.Close()
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOTTY) {
			err = nil
		}
		return nil, nil, err
	}
	return f, info, nil
}

func nameOf(info *unix.LoopInfo64) string { return unix.ByteSliceToString(info.File_name[:]) }

// Device is a loop device of a stack.
type Device struct {
	Path, Stack string // the latter is the directory, which may be gone
	name        string
}

// Detach gives it back.
func (d Device) Detach() error { return detach(d.Path, d.name) }

// Devices gives the loop devices of a daemon's stacks that stay attached.
func Devices(state string) (out []Device, err error) {
	err = each(func(device string, info *unix.LoopInfo64) {
		rest, ours := strings.CutPrefix(nameOf(info), namesOf(state))
		if !ours || info.Flags&unix.LO_FLAGS_AUTOCLEAR != 0 {
			return
		}
		base, _, _ := strings.Cut(rest, "/")
		out = append(out, Device{Path: device, Stack: filepath.Join(state, Dir, base), name: nameOf(info)})
	})
	return out, err
}

// each calls fn for every loop device to which something is attached.
func each(fn func(device string, info *unix.LoopInfo64)) error {
	attached, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range attached {
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(a))))
		f, info, err := status(device)
		if f == nil {
			errs = append(errs, err)
			continue
		}
		_ = f.Close()
		fn(device, info)
	}
	return errors.Join(errs...)
}
