package devmapper

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// control is where the kernel is asked about devices.
const control = "/dev/mapper/control"

// Requests to control, from linux/dm-ioctl.h.
const (
	tableStatus = 0xc138fd0c // DM_TABLE_STATUS
	targetMsg   = 0xc138fd0e // DM_TARGET_MSG

	bufferFull = 1 << 8 // DM_BUFFER_FULL_FLAG
	answerSize = 4096   // bytes for a status; those of thin devices and pools have less than 200
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
func request(number uintptr, name string, data []byte) (answer []byte, targets uint32, err error) {
	f, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = f.Close() }()
	const start = uint32(unsafe.Sizeof(header{}))
	buf := make([]byte, int(start)+max(len(data), answerSize))
	h := (*header)(unsafe.Pointer(&buf[0]))
	h.version = [3]uint32{4, 0, 0}
	h.size, h.start = uint32(len(buf)), start
	if len(name) >= len(h.name) {
		return nil, 0, unix.ENAMETOOLONG
	}
	copy(h.name[:], name)
	copy(buf[start:], data)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), number, uintptr(unsafe.Pointer(h))); errno != 0 {
		return nil, 0, errno
	}
	if h.flags&bufferFull != 0 || int(h.start) > len(buf) {
		return nil, 0, unix.ENOSPC
	}
	return buf[h.start:], h.targets, nil
}

// status gives what the one target of a device says of itself: the words behind its name.
func status(name, target string) (string, error) {
	const size = 40 // of struct dm_target_spec: start, length, status, next, and the name of the target
	answer, targets, err := request(tableStatus, name, nil)
	if err != nil {
		return "", fmt.Errorf("cannot get the status of device %s: %w", name, err)
	}
	if targets == 0 || len(answer) < size {
		return "", fmt.Errorf("device %s has no table: %w", name, unix.ENXIO)
	}
	text := func(b []byte) string {
		b, _, _ = bytes.Cut(b, []byte{0})
		return string(b)
	}
	if is := text(answer[size-16 : size]); targets != 1 || is != target {
		return "", fmt.Errorf("device %s is no %s, it is %s: %w", name, target, is, unix.EINVAL)
	}
	return text(answer[size:]), nil
}

// message tells a pool to do something.
func message(pool, text string) error {
	// struct dm_target_msg: the sector, any of the pool's, and the text.
	data := append(binary.NativeEndian.AppendUint64(nil, 0), text+"\x00"...)
	if _, _, err := request(targetMsg, pool, data); err != nil {
		return fmt.Errorf("cannot tell thin pool %s: %s: %w", pool, text, err)
	}
	return nil
}
