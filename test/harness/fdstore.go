package harness

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// FDStore is the part of a service manager that keeps descriptors for a daemon (sd_notify(3), FDSTORE=1) and passes them to
// the next one (sd_listen_fds(3)).
type FDStore struct {
	path  string
	conn  *net.UnixConn
	ended chan struct{}

	mu   sync.Mutex
	kept map[string]*os.File
	seen map[string]chan struct{} // messages of our own, by what is in them
}

// NewFDStore gives the daemons that d starts from now on a store. Close, or Raze, of d ends it.
func (d *Daemon) NewFDStore() (*FDStore, error) {
	path := filepath.Join(d.Dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("cannot keep descriptors: %w", err)
	}
	s := &FDStore{path: path, conn: conn, ended: make(chan struct{}), kept: map[string]*os.File{}, seen: map[string]chan struct{}{}}
	go s.serve()
	d.store = s
	return s, nil
}

func (s *FDStore) serve() {
	defer close(s.ended)
	data, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*16))
	for {
		n, on, _, _, err := s.conn.ReadMsgUnix(data, oob)
		if err != nil {
			return
		}
		s.take(string(data[:n]), received(oob[:on]))
	}
}

func received(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		more, _ := unix.ParseUnixRights(&m) // another kind of message has none
		fds = append(fds, more...)
	}
	return fds
}

func (s *FDStore) take(message string, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seen := s.seen[message]; seen != nil {
		close(seen)
		delete(s.seen, message)
	}
	lines := strings.Split(message, "\n")
	name := ""
	for _, line := range lines {
		if v, is := strings.CutPrefix(line, "FDNAME="); is {
			name = v
		}
	}
	keep, drop := slices.Contains(lines, "FDSTORE=1"), slices.Contains(lines, "FDSTOREREMOVE=1")
	if old := s.kept[name]; old != nil && (keep || drop) {
		_ = old.Close()
		delete(s.kept, name)
	}
	for i, fd := range fds {
		if keep && i == 0 {
			s.kept[name] = os.NewFile(uintptr(fd), name)
		} else {
			_ = unix.Close(fd)
		}
	}
}

// settle returns when everything is taken that was sent before.
func (s *FDStore) settle() error {
	seen := make(chan struct{})
	s.mu.Lock()
	message := fmt.Sprintf("X_HARNESS=%p", seen)
	s.seen[message] = seen
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), Starting)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unixgram", s.path)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte(message)); err != nil {
		return err
	}
	select {
	case <-seen:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the store of descriptors is not served: %w", ctx.Err())
	}
}

// start starts a daemon's command with what is kept. LISTEN_PID is only known to the process itself, before it becomes the
// daemon.
func (s *FDStore) start(cmd *exec.Cmd) error {
	if err := s.settle(); err != nil { // a daemon that was killed may have said something last
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	names := slices.Sorted(maps.Keys(s.kept))
	for _, n := range names {
		cmd.ExtraFiles = append(cmd.ExtraFiles, s.kept[n])
	}
	shell, err := exec.LookPath("sh")
	if err != nil {
		return err
	}
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = shell
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+s.path, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	return cmd.Start()
}

// Each calls fn with a copy of everything that is kept, which is closed behind it.
func (s *FDStore) Each(fn func(f *os.File)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for name, f := range s.kept {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c := os.NewFile(uintptr(fd), name)
		fn(c)
		_ = c.Close()
	}
	return errors.Join(errs...)
}

// Empty says whether nothing is kept within a time.
func (s *FDStore) Empty(within time.Duration) bool {
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		s.mu.Lock()
		n := len(s.kept)
		s.mu.Unlock()
		if n == 0 || time.Now().After(deadline) {
			return n == 0
		}
	}
}

func (s *FDStore) close() {
	_ = s.conn.Close()
	<-s.ended
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.kept {
		_ = f.Close()
	}
	s.kept = map[string]*os.File{}
}
