package devmapper

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// discardAll discards the first size bytes of a block device.
func discardAll(fd int, size uint64) error {
	span := [2]uint64{0, size}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span))); errno != 0 {
		return os.NewSyscallError("BLKDISCARD", errno)
	}
	return nil
}
