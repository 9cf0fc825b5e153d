package shimapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// listenVsock listens on a port of its own for connections within the machine.
func listenVsock(t *testing.T) (fd int, address string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Skip("the kernel has no vsock: ", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: unix.VMADDR_PORT_ANY}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fd, vsockAddr{CID: unix.VMADDR_CID_LOCAL, Port: sa.(*unix.SockaddrVM).Port}.String()
}

// TestVsock: a connection carries bytes both ways and comes to its end; where nobody listens it is refused.
func TestVsock(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	fd, address := listenVsock(t)
	c, err := DialSocket(ctx, address)
	if errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.ENODEV) {
		t.Skip("the kernel has no vsock within the machine (module vsock_loopback): ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	n, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	peer := newVsockConn(n, vsockAddr{})
	defer func() { _ = peer.Close() }()
	if c.RemoteAddr().String() != address || c.LocalAddr().(vsockAddr).Port == 0 {
		t.Errorf("from %s to %s", c.LocalAddr(), c.RemoteAddr())
	}
	in := bufio.NewReader(c)
	for i := range 100 {
		if _, err := fmt.Fprintln(peer, i); err != nil {
			t.Fatal(err)
		}
		if line, err := in.ReadString('\n'); err != nil || line != fmt.Sprintln(i) {
			t.Fatalf("%q, %v", line, err)
		}
		if _, err := fmt.Fprintln(c, i); err != nil {
			t.Fatal(err)
		}
	}
	_ = peer.Close()
	if line, err := in.ReadString('\n'); err == nil {
		t.Errorf("behind the end: %q", line)
	}
	_ = unix.Shutdown(fd, unix.SHUT_RDWR)
	if _, err := DialSocket(ctx, vsockAddr{CID: unix.VMADDR_CID_LOCAL, Port: 1}.String()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestVsockAddress(t *testing.T) {
	for _, address := range []string{"vsock://", "vsock://3", "vsock://x:1", "vsock://3:-1", "vsock://3:4294967296", "vsock://3:1:2"} {
		if a, err := parseVsock(address); err == nil {
			t.Errorf("%s is %v", address, a)
		}
	}
	if a, err := parseVsock("vsock://3:1024"); err != nil || a.CID != 3 || a.Port != 1024 {
		t.Errorf("%v, %v", a, err)
	}
}
