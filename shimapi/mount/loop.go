package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// loops bounds how often a loop device is lost to somebody who was faster.
const loops = 64

// MaxLoopName is the longest Loop.Name, in bytes.
const MaxLoopName = unix.LO_NAME_SIZE - 1

// sector is the size of a loop device's sectors, in bytes: file systems that were made in a file count on it.
const sector = 512

// Loop says how a file becomes a block device.
type Loop struct {
	ReadOnly bool
	// Direct has it go past the page cache of the file, where that can be done in sectors of 512 bytes.
	Direct bool
	// Name is what LOOP_GET_STATUS64 tells of it, instead of the file's path.
	Name string
}

// attached finds a writable loop device that a file is already, "" for none.
func attached(file string) string {
	file, err := filepath.EvalSymlinks(file)
	if err != nil {
		return ""
	}
	found, _ := filepath.Glob("/sys/block/loop*/loop/backing_file") // the pattern is right
	for _, f := range found {
		block := filepath.Dir(filepath.Dir(f))
		is, err := os.ReadFile(f) // it may be gone by now
		ro, roerr := os.ReadFile(filepath.Join(block, "ro"))
		if err == nil && roerr == nil && strings.TrimSuffix(string(is), "\n") == file && string(ro) == "0\n" {
			return "/dev/" + filepath.Base(block)
		}
	}
	return ""
}

// loop is Attach for a moment.
func loop(file string, readonly bool) (*os.File, error) {
	return Attach(file, Loop{ReadOnly: readonly})
}

// Attach makes file a block device that is gone when nobody uses it any more (loop(4), LO_FLAGS_AUTOCLEAR). The caller
// closes it once it is mounted.
func Attach(file string, l Loop) (*os.File, error) {
	mode, flags, name, size := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR), l.Name, uint32(0)
	if l.ReadOnly {
		mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	if l.Direct {
		flags, size = flags|unix.LO_FLAGS_DIRECT_IO, sector
	}
	if name == "" {
		name = file
	}
	back, err := os.OpenFile(file, mode, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = back.Close() }()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("no loop device for %s: %w", file, err)
	}
	defer func() { _ = control.Close() }()
	for range loops {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("no loop device for %s: %w", file, os.NewSyscallError("LOOP_CTL_GET_FREE", err))
		}
		dev, err := os.OpenFile(fmt.Sprint("/dev/loop", n), mode, 0)
		if err != nil {
			return nil, fmt.Errorf("no loop device for %s: %w", file, err)
		}
		c := unix.LoopConfig{Fd: uint32(back.Fd()), Size: size, Info: unix.LoopInfo64{Flags: flags}}
		copy(c.Info.File_name[:MaxLoopName], name)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &c)
		if err == nil {
			return dev, nil
		}
		_ = dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("no loop device for %s: %w", file, os.NewSyscallError("LOOP_CONFIGURE", err))
		}
	}
	return nil, fmt.Errorf("no loop device for %s: %w", file, unix.EBUSY)
}
