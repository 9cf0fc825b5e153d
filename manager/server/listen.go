package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/activation"

	"github.com/managerd/managerd/shimapi"
)

// activated are the sockets that systemd holds for us (sd_listen_fds(3)). They are taken once.
var activated = sync.OnceValues(activation.Listeners)

// listen opens a Unix socket, or takes the one that systemd passed for the same path. The file stays when the listener
// is closed, and is replaced in one step when there is one already: a client that finds no file fails at once, one that
// finds a closed socket tries again.
func listen(path string, uid, gid int) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("cannot listen on %q: not an absolute path", path)
	}
	passed, err := activated()
	if err != nil {
		return nil, fmt.Errorf("cannot take the sockets of the service manager: %w", err)
	}
	for _, l := range passed {
		if l != nil && l.Addr().Network() == "unix" && l.Addr().String() == path {
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			return l, nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("cannot listen on %s: there is a file that is no socket", path)
	}
	if c, err := shimapi.DialSocket(context.Background(), path); err == nil { // a local connect does not wait
		_ = c.Close()
		return nil, fmt.Errorf("cannot listen on %s: another process serves it: %w", path, errdefs.ErrUnavailable)
	}
	temp := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%d", os.Getpid())) // short: an address has 107 bytes
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	l, err := shimapi.Listen(temp)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	err = errors.Join(os.Chmod(temp, 0o660), os.Chown(temp, uid, gid))
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(temp)
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	return l, nil
}

// unixPath takes the path out of an address, which may be written as unix:///path.
func unixPath(address string) string { return strings.TrimPrefix(address, "unix://") }
