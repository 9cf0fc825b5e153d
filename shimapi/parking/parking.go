// Package parking carries descriptors that must outlive a shim to the daemon, and from there to the shim's successor. It
// is a SOCK_SEQPACKET socket: a parcel that was sent is received even when its sender is killed a moment later, so nobody
// waits for an answer.
//
// What is parked of a process: a pidfd, by which its exit status can be learnt by whoever did not fork it, also after it
// was reaped; the master of its terminal, which would hang up without it; our end of each of its FIFOs, so that no end of
// file is seen and no unread byte is thrown away; and the client's FIFOs, for the same reasons on the other side.
package parking

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
)

// SocketName is the file name of the parking socket in the daemon's state directory.
const SocketName = "park.sock"

// EnvSocket names the parking socket in the environment of a shim of ours.
const EnvSocket = "MANAGERD_PARK"

// HandoverFD is the descriptor number, under the verb adopt, of a connection that carries what was parked, to its end of
// file.
const HandoverFD = 4

// The kinds of descriptors.
const (
	Pidfd        = "pidfd"
	Terminal     = "terminal"
	Stdin        = "stdin"
	Stdout       = "stdout"
	Stderr       = "stderr"
	ClientStdin  = "client-stdin"
	ClientStdout = "client-stdout"
	ClientStderr = "client-stderr"
)

// most are the descriptors that one parcel may carry, and the bytes that it may have.
const (
	mostFDs   = 16
	mostBytes = 16 << 10
)

// patience is how long Send waits for room: the other side may be stopped.
const patience = 100 * time.Millisecond

// Listen makes the parking socket at path, with mode 0600. What an earlier daemon left there is replaced. The caller
// closes the listener.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot make parking socket: %w", err)
	}
	short, done, err := shimapi.ShortPath(path)
	if err != nil {
		return nil, fmt.Errorf("cannot make parking socket: %w", err)
	}
	defer done()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: short, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("cannot make parking socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("cannot make parking socket: %w", err)
	}
	return l, nil
}

// Dial connects to the parking socket at path.
func Dial(ctx context.Context, path string) (*net.UnixConn, error) {
	short, done, err := shimapi.ShortPath(path)
	if err != nil {
		return nil, fmt.Errorf("cannot reach parking socket: %w", err)
	}
	defer done()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", short)
	if err != nil {
		return nil, fmt.Errorf("cannot reach parking socket %s: %w", path, err)
	}
	return c.(*net.UnixConn), nil
}

// Pair gives both ends of a connection: ours, and the one that a successor gets as descriptor HandoverFD.
func Pair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a hand-over connection: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "handover")
	if ours, err = Conn(os.NewFile(uintptr(fds[0]), "handover")); err != nil {
		_ = theirs.Close()
	}
	return ours, theirs, err
}

// Conn makes a connection of a descriptor, which it closes.
func Conn(f *os.File) (*net.UnixConn, error) {
	defer func() { _ = f.Close() }()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %s is no hand-over connection: %w", f.Name(), err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, fmt.Errorf("descriptor %s is a %T, no hand-over connection", f.Name(), c)
	}
	return u, nil
}

// Send sends p with files, which stay the caller's, in the order of p.Kinds. After an error the connection is useless.
func Send(c *net.UnixConn, p *shimstate.Parcel, files []*os.File) error {
	data, err := p.Marshal()
	if err != nil {
		return fmt.Errorf("cannot send parcel: %w", err)
	}
	if len(files) != len(p.Kinds) || len(files) > mostFDs || len(data) > mostBytes || len(data) == 0 {
		return fmt.Errorf("cannot send parcel of %d bytes with %d descriptors of %d kinds", len(data), len(files), len(p.Kinds))
	}
	fds := make([]int, 0, len(files))
	for _, f := range files {
		rc, err := f.SyscallConn()
		if err == nil {
			err = rc.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
		}
		if err != nil {
			return fmt.Errorf("cannot send parcel: %w", err)
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := c.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return fmt.Errorf("cannot send parcel: %w", err)
	}
	if _, _, err := c.WriteMsgUnix(data, oob, nil); err != nil {
		return fmt.Errorf("cannot send parcel: %w", err)
	}
	return nil
}

// Receive receives a parcel, and the files in the order of its kinds, which become the caller's. io.EOF at the end.
func Receive(c *net.UnixConn) (*shimstate.Parcel, []*os.File, error) {
	data, oob := make([]byte, mostBytes), make([]byte, unix.CmsgSpace(4*mostFDs))
	n, on, flags, _, err := c.ReadMsgUnix(data, oob)
	if err != nil {
		return nil, nil, err
	}
	return open(data[:n], oob[:on], flags)
}

// Peek gives what Receive would give, of a socket's descriptor, and leaves it there. It does not wait.
func Peek(fd int) (*shimstate.Parcel, []*os.File, error) {
	data, oob := make([]byte, mostBytes), make([]byte, unix.CmsgSpace(4*mostFDs))
	n, on, flags, _, err := unix.Recvmsg(fd, data, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot look at a parcel: %w", err)
	}
	return open(data[:n], oob[:on], flags)
}

// open takes a message apart.
func open(data, oob []byte, flags int) (*shimstate.Parcel, []*os.File, error) {
	var files []*os.File
	if msgs, err := unix.ParseSocketControlMessage(oob); err == nil {
		for _, m := range msgs {
			if fds, err := unix.ParseUnixRights(&m); err == nil {
				for _, fd := range fds {
					files = append(files, os.NewFile(uintptr(fd), "parked"))
				}
			}
		}
	}
	p := &shimstate.Parcel{}
	err := p.Unmarshal(data)
	if err == nil && (flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(files) != len(p.Kinds)) {
		err = fmt.Errorf("%d descriptors of %d kinds, flags %#x", len(files), len(p.Kinds), flags)
	}
	if err != nil {
		for _, f := range files {
			_ = f.Close()
		}
		return nil, nil, fmt.Errorf("malformed parcel: %w", err)
	}
	return p, files, nil
}
