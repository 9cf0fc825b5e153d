package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/parking"
)

// passed is what the service manager passed to this process (sd_listen_fds(3)): sockets that it listens on for us, and what
// an earlier daemon gave it to keep. It is taken once.
var passed = sync.OnceValue(func() (p struct{ sockets, kept []*os.File }) {
	for _, f := range activation.Files(true) {
		if strings.HasPrefix(f.Name(), parking.VaultPrefix) {
			p.kept = append(p.kept, f)
		} else {
			p.sockets = append(p.sockets, f)
		}
	}
	return p
})

// keeping is how long the service manager may take to read a message.
const keeping = time.Second

// fdStore is the service manager's file descriptor store (FileDescriptorStoreMax= in systemd.service(5), FDSTORE=1 in
// sd_notify(3)). It lives as long as the service is not stopped.
type fdStore struct {
	socket string // the service manager's
	kept   []*os.File
}

// vault is where descriptors outlive this process; nil when there is no service manager.
func (s *Server) vault() parking.Vault {
	kept := passed().kept
	if socket := os.Getenv("NOTIFY_SOCKET"); socket != "" {
		return &fdStore{socket: socket, kept: kept}
	}
	return nil
}

func (s *fdStore) Kept() []*os.File { return s.kept }

// Keep has a copy kept. FDPOLL=0: it stays when the other end hangs up, for what was written before.
func (s *fdStore) Keep(name string, f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("cannot store descriptor %s: %w", name, err)
	}
	cerr := rc.Control(func(fd uintptr) {
		err = s.send("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, unix.UnixRights(int(fd)))
	})
	if err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("cannot store descriptor %s: %w", name, err)
	}
	return nil
}

func (s *fdStore) Release(name string) error {
	if err := s.send("FDSTOREREMOVE=1\nFDNAME="+name, nil); err != nil {
		return fmt.Errorf("cannot remove descriptor %s from the store: %w", name, err)
	}
	return nil
}

func (s *fdStore) send(message string, oob []byte) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	limit := unix.NsecToTimeval(keeping.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return err
	}
	for {
		err := unix.Sendmsg(fd, []byte(message), oob, &unix.SockaddrUnix{Name: s.socket}, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// activated are the listeners that the service manager holds for us.
var activated = sync.OnceValue(func() (all []*net.UnixListener) {
	for _, f := range passed().sockets {
		l, err := net.FileListener(f)
		_ = f.Close()
		if err != nil {
			slog.Warn("what the service manager passed is no socket to listen on", "name", f.Name(), "error", err)
			continue
		}
		if u, ok := l.(*net.UnixListener); ok {
			all = append(all, u)
		} else {
			_ = l.Close()
		}
	}
	return all
})
