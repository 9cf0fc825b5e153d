package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// lockFile stands in the root and in the state directory; its content is the pid of the daemon that holds it.
const lockFile = "managerd.lock"

// lockWait is how long a daemon that is just ending may hold on to its directories.
const lockWait = 5 * time.Second

// lock takes a directory for this process, until the file is closed or the process ends, however it ends. Unavailable,
// with the pid of the other, when another daemon has it.
func lock(ctx context.Context, dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock %s: %w", dir, err)
	}
	for deadline := time.Now().Add(lockWait); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			holder, _ := os.ReadFile(path)
			_ = f.Close()
			return nil, fmt.Errorf("%s is in use by another managerd (pid %s); stop it, or use another --root and --state: %w",
				dir, strings.TrimSpace(string(holder)), errdefs.ErrUnavailable)
		}
		time.Sleep(10 * time.Millisecond) // flock(2) cannot wait with a deadline
	}
	if err := errors.Join(f.Truncate(0), writePID(f)); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("cannot write %s: %w", path, err)
	}
	return f, nil
}

func writePID(f *os.File) error {
	_, err := f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return err
}
