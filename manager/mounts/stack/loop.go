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

// Attach makes file the loop device that point links to. It stays, whoever dies, until Undo.
func Attach(dir string, n int, file string, readonly bool) (point, device string, err error) {
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

// detach gives a device back that has this name; what is mounted of it by others has it until it is unmounted.
func detach(device, name string) error {
	f, info, err := status(device)
	if err != nil || f == nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if nameOf(info) != name {
		return nil // by now it is somebody else's
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
func Devices(state string) ([]Device, error) {
	attached, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var out []Device
	var errs []error
	for _, a := range attached {
		d := Device{Path: filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(a))))}
		f, info, err := status(d.Path)
		if f == nil {
			errs = append(errs, err)
			continue
		}
		_ = f.Close()
		d.name = nameOf(info)
		rest, ours := strings.CutPrefix(d.name, namesOf(state))
		if !ours || info.Flags&unix.LO_FLAGS_AUTOCLEAR != 0 {
			continue
		}
		base, _, _ := strings.Cut(rest, "/")
		d.Stack = filepath.Join(state, Dir, base)
		out = append(out, d)
	}
	return out, errors.Join(errs...)
}
