package client

import (
	"net"
	"time"
)

// dialer tries a socket, to tell why a connection cannot be made.
type dialer struct{}

func (*dialer) dial(path string) (net.Conn, error) {
	return net.DialTimeout("unix", path, time.Second)
}
