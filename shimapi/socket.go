package shimapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxSunPath is the longest pathname that fits sockaddr_un.sun_path with its terminating NUL (unix(7)).
const maxSunPath = 107

// Listen binds a unix stream socket at path with mode 0600, making its directory (0711) if needed. A stale socket
// file (nobody listens) is replaced; a live one is an error. Paths beyond sun_path's 107 bytes work: they are
// reached through a descriptor of their directory. The caller closes the listener; the file is not unlinked then,
// because the socket may have been handed to another process.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("cannot make directory of socket %s: %w", path, err)
	}
	l, err := bind(path)
	if errors.Is(err, unix.EADDRINUSE) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		c, derr := DialSocket(ctx, path)
		if derr == nil {
			_ = c.Close()
			return nil, fmt.Errorf("cannot listen on %s: another process serves it: %w", path, err)
		}
		if !errors.Is(derr, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
		}
		// Connecting to a plain file is refused too.
		if fi, serr := os.Lstat(path); serr == nil && fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("cannot listen on %s: something else has that name: %w", path, err)
		}
		if rerr := os.Remove(path); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			return nil, fmt.Errorf("cannot remove stale socket %s: %w", path, rerr)
		}
		l, err = bind(path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	return l, nil
}

func bind(path string) (*net.UnixListener, error) {
	short, done, err := ShortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// DialSocket connects to a unix stream socket; path may carry a "unix://" prefix and exceed sun_path. Or it is vsock://CID:PORT. The error
// wraps ECONNREFUSED when the file is there and nobody listens, ENOENT when there is no file.
func DialSocket(ctx context.Context, path string) (net.Conn, error) {
	if strings.HasPrefix(path, vsockPrefix) {
		return dialVsock(ctx, path)
	}
	path = strings.TrimPrefix(path, "unix://")
	short, done, err := ShortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	var d net.Dialer
	return d.DialContext(ctx, "unix", short)
}

// ShortPath gives a name for path that fits sun_path; done releases what it takes.
func ShortPath(path string) (short string, done func(), err error) {
	if len(path) <= maxSunPath {
		return path, func() {}, nil
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(path)), func() { _ = unix.Close(fd) }, nil
}
