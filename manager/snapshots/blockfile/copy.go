package blockfile

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// copyFile makes dst a copy of src that shares its blocks where the file system can (FICLONE), and else has its holes.
func copyFile(dst, src string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot copy %s to %s: %w", src, dst, err)
		}
	}()
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return nil
	}
	st, err := in.Stat()
	if err != nil {
		return err
	}
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	for at := int64(0); at < st.Size(); {
		begin, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return os.NewSyscallError("lseek (SEEK_DATA)", err)
		}
		end, err := unix.Seek(int(in.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return os.NewSyscallError("lseek (SEEK_HOLE)", err)
		}
		if err := copyRange(out, in, begin, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

func copyRange(out, in *os.File, begin, end int64) error {
	to := begin
	for begin < end {
		n, err := unix.CopyFileRange(int(in.Fd()), &begin, int(out.Fd()), &to, int(min(end-begin, 1<<30)), 0)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
			return readWrite(out, in, begin, end)
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("copy_file_range", err)
		}
		if n == 0 {
			return fmt.Errorf("it became shorter meanwhile: %w", unix.EIO)
		}
	}
	return nil
}

// readWrite copies between file systems of different kinds.
func readWrite(out, in *os.File, begin, end int64) error {
	buf := make([]byte, 1<<20)
	for begin < end {
		n, err := in.ReadAt(buf[:min(int64(len(buf)), end-begin)], begin)
		if n == 0 && err != nil {
			return err
		}
		if _, err := out.WriteAt(buf[:n], begin); err != nil {
			return err
		}
		begin += int64(n)
	}
	return nil
}
