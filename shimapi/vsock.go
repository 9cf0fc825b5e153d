package shimapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// vsockPrefix begins the address of a socket between a machine and a virtual one (vsock(7)): vsock://CID:PORT.
const vsockPrefix = "vsock://"

// vsockAddr is such an address.
type vsockAddr unix.SockaddrVM

func (a vsockAddr) Network() string { return "vsock" }
func (a vsockAddr) String() string  { return fmt.Sprintf("%s%d:%d", vsockPrefix, a.CID, a.Port) }

func parseVsock(address string) (a vsockAddr, err error) {
	cid, port, ok := strings.Cut(strings.TrimPrefix(address, vsockPrefix), ":")
	var n [2]uint64
	for i, s := range []string{cid, port} {
		if n[i], err = strconv.ParseUint(s, 10, 32); err != nil || !ok {
			return a, fmt.Errorf("address %q is not of the form vsock://CID:PORT", clip([]byte(address)))
		}
	}
	return vsockAddr{CID: uint32(n[0]), Port: uint32(n[1])}, nil
}

// vsockConn is a connection; package net knows none of its kind.
type vsockConn struct {
	*os.File
	local, remote vsockAddr
}

func (c vsockConn) LocalAddr() net.Addr  { return c.local }
func (c vsockConn) RemoteAddr() net.Addr { return c.remote }

// newVsockConn makes a connection of a descriptor that is non-blocking, which becomes its own.
func newVsockConn(fd int, remote vsockAddr) vsockConn {
	c := vsockConn{File: os.NewFile(uintptr(fd), remote.String()), remote: remote}
	if sa, err := unix.Getsockname(fd); err == nil {
		if vm, ok := sa.(*unix.SockaddrVM); ok {
			c.local = vsockAddr{CID: vm.CID, Port: vm.Port}
		}
	}
	return c
}

// dialVsock connects. The error wraps ECONNREFUSED when nobody listens, or the virtual machine is gone.
func dialVsock(ctx context.Context, address string) (net.Conn, error) {
	a, err := parseVsock(address)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	err = unix.Connect(fd, &unix.SockaddrVM{CID: a.CID, Port: a.Port})
	c := newVsockConn(fd, a)
	if errors.Is(err, unix.EINPROGRESS) {
		err = c.connected(ctx)
	}
	if err == nil {
		return c, nil
	}
	_ = c.Close()
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EHOSTUNREACH) {
		err = fmt.Errorf("%w: %w", err, unix.ECONNREFUSED)
	}
	return nil, fmt.Errorf("connect to %s: %w", a, err)
}

// connected waits until a connect(2) that is under way has ended.
func (c vsockConn) connected(ctx context.Context) error {
	deadline, _ := ctx.Deadline()
	if err := c.SetWriteDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Write(func(fd uintptr) bool { // it is called once before it has waited, and the connect may have ended by then
		if _, err := unix.Getpeername(int(fd)); err == nil {
			return true
		}
		n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if result = err; err == nil && n != 0 {
			result = unix.Errno(n)
		}
		return result != nil
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	case result != nil:
		return result
	}
	if !stop() { // its deadline must not outlive the connect
		return ctx.Err()
	}
	return c.SetWriteDeadline(time.Time{})
}
