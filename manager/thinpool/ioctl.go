// Package thinpool asks the kernel about devices of device-mapper, thin pools and what stands in them, and tells pools what to do.
// It must not know what the devices are for.
package thinpool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Control is where the kernel is asked about devices; opening it loads the module.
const Control = "/dev/mapper/control"

// Requests to Control, from linux/dm-ioctl.h.
const (
	devSuspend  = 0xc138fd06 // DM_DEV_SUSPEND
	devStatus   = 0xc138fd07 // DM_DEV_STATUS
	tableStatus = 0xc138fd0c // DM_TABLE_STATUS
	targetMsg   = 0xc138fd0e // DM_TARGET_MSG

	isSuspended = 1 << 1 // DM_SUSPEND_FLAG
	table       = 1 << 4 // DM_STATUS_TABLE_FLAG
	bufferFull  = 1 << 8 // DM_BUFFER_FULL_FLAG
	answerSize  = 4096   // bytes for a status; those of thin devices and pools have less than 200
)

// header is struct dm_ioctl, behind which comes what is asked, or answered.
type header struct {
	version     [3]uint32
	size, start uint32 // of all of it, and where the data begin
	targets     uint32
	_           int32 // open_count
	flags       uint32
	_           [2]uint32 // event_nr, padding
	_           uint64    // dev
	name        [128]byte
	_           [136]byte // uuid, data
}

// request makes one about a device; data has what is asked. The answer begins with the targets that the device consists of.
func request(number uintptr, name string, flags uint32, data []byte) (answer []byte, head *header, err error) {
	f, err := os.OpenFile(Control, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = f.Close() }()
	const start = uint32(unsafe.Sizeof(header{}))
	buf := make([]byte, int(start)+max(len(data), answerSize))
	h := (*header)(unsafe.Pointer(&buf[0]))
	h.version = [3]uint32{4, 0, 0}
	h.size, h.start, h.flags = uint32(len(buf)), start, flags
	if len(name) >= len(h.name) {
		return nil, nil, unix.ENAMETOOLONG
	}
	copy(h.name[:], name)
	copy(buf[start:], data)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), number, uintptr(unsafe.Pointer(h))); errno != 0 {
		return nil, nil, errno
	}
	if h.flags&bufferFull != 0 || int(h.start) > len(buf) {
		return nil, nil, unix.ENOSPC
	}
	return buf[h.start:], h, nil
}

// Seen says whether a device is there, and whether it is suspended: what is written to it waits then.
func Seen(name string) (is, suspended bool, err error) {
	_, h, err := request(devStatus, name, 0, nil)
	if errors.Is(err, unix.ENXIO) {
		return false, false, nil
	}
	if err != nil {
		return false, false, fmt.Errorf("cannot look for device %s: %w", name, err)
	}
	return true, h.flags&isSuspended != 0, nil
}

// Active says whether a device of this name is there.
func Active(name string) (bool, error) {
	is, _, err := Seen(name)
	return is, err
}

// Suspend has all that is written to a device go to the pool, and what comes later wait until Resume.
func Suspend(name string) error {
	if _, _, err := request(devSuspend, name, isSuspended, nil); err != nil {
		return fmt.Errorf("cannot suspend device %s: %w", name, err)
	}
	return nil
}

// Resume ends that; none suspended is no error.
func Resume(name string) error {
	if _, _, err := request(devSuspend, name, 0, nil); err != nil {
		return fmt.Errorf("cannot resume device %s, which keeps whoever writes to it waiting: %w", name, err)
	}
	return nil
}

// describe gives what the one target of a device says of itself, or its table: the words behind its name.
func describe(name, target string, flags uint32) (string, error) {
	const size = 40 // of struct dm_target_spec: start, length, status, next, and the name of the target
	answer, h, err := request(tableStatus, name, flags, nil)
	if err != nil {
		return "", fmt.Errorf("cannot get the status of device %s: %w", name, err)
	}
	if h.targets == 0 || len(answer) < size {
		return "", fmt.Errorf("device %s has no table: %w", name, unix.ENXIO)
	}
	text := func(b []byte) string {
		b, _, _ = bytes.Cut(b, []byte{0})
		return string(b)
	}
	if is := text(answer[size-16 : size]); h.targets != 1 || is != target {
		return "", fmt.Errorf("device %s is no %s, it is %s: %w", name, target, is, unix.EINVAL)
	}
	return text(answer[size:]), nil
}

// Message tells a pool to do something.
func Message(pool, text string) error {
	// struct dm_target_msg: the sector, any of the pool's, and the text.
	data := append(binary.NativeEndian.AppendUint64(nil, 0), text+"\x00"...)
	if _, _, err := request(targetMsg, pool, 0, data); err != nil {
		return fmt.Errorf("cannot tell thin pool %s: %s: %w", pool, text, err)
	}
	return nil
}
