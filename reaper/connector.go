package reaper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// connector hears from the kernel how processes end that are not our children: the exit events of the process connector
// (linux/cn_proc.h, since Linux 2.6.15). It is for kernels before 6.15, which tell nobody but the parent through a pidfd. It
// needs CAP_NET_ADMIN and the initial pid and network namespaces; elsewhere it hears nothing.
type connector struct {
	mu   sync.Mutex
	sock *os.File // nil while nobody is watched
	seen map[int]*ending
	buf  []byte
}

// ending is what was heard of one process. A process of several threads ends with one event for each.
type ending struct {
	leader unix.WaitStatus // of the last event of its first thread
	last   unix.WaitStatus // of the last event of any thread
	heard  bool
}

// What is read of an event: a netlink header, a connector header, and struct proc_event.
const (
	cnIdxProc, cnValProc = 1, 1
	procListen           = 1
	procEventExit        = 0x80000000
	cnMsgAt              = unix.SizeofNlMsghdr
	eventAt              = cnMsgAt + 20
	whatAt               = eventAt
	pidAt                = eventAt + 16
	tgidAt               = pidAt + 4
	codeAt               = tgidAt + 4
	eventEnd             = codeAt + 4
	// filtered is for how many processes the kernel is asked to leave the events of others out: the filter is a list.
	filtered = 50
)

// watch begins to listen for the end of process pid. What ended before is not heard. forget ends it.
func (c *connector) watch(pid int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sock == nil {
		if err := c.open(); err != nil {
			return fmt.Errorf("cannot listen to the process connector: %w", err)
		}
	}
	if c.seen == nil {
		c.seen = map[int]*ending{}
	}
	c.seen[pid] = &ending{}
	return c.filter()
}

// forget ends what watch began. The last one closes the socket.
func (c *connector) forget(pid int) {
	c.mu.Lock()
	delete(c.seen, pid)
	var idle *os.File
	switch {
	case c.sock == nil:
	case len(c.seen) == 0:
		idle, c.sock, c.buf = c.sock, nil, nil
	default:
		_ = c.filter() // a longer list than need be does no harm
	}
	c.mu.Unlock()
	if idle != nil {
		_ = idle.Close() // waits for drain, which takes the lock
	}
}

// exit says how a watched process ended, of which the caller knows that it has: its pidfd is readable.
func (c *connector) exit(pid int) (ws unix.WaitStatus, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sock == nil {
		return 0, false
	}
	if conn, err := c.sock.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { c.drainLocked(int(fd)) })
	}
	e := c.seen[pid]
	// A first thread that went before the others says nothing about the process, unless all agree.
	if e == nil || !e.heard || e.leader != e.last {
		return 0, false
	}
	return e.leader, true
}

func (c *connector) open() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	if err := listen(fd); err != nil {
		_ = unix.Close(fd)
		return err
	}
	sock := os.NewFile(uintptr(fd), "connector")
	c.sock, c.buf = sock, make([]byte, 4096)
	go c.drain(sock)
	return nil
}

func listen(fd int) error {
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnIdxProc}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	msg := make([]byte, eventAt+4)
	h := binary.NativeEndian
	h.PutUint32(msg, uint32(len(msg)))
	h.PutUint16(msg[4:], unix.NLMSG_DONE)
	h.PutUint32(msg[cnMsgAt:], cnIdxProc)
	h.PutUint32(msg[cnMsgAt+4:], cnValProc)
	h.PutUint16(msg[cnMsgAt+16:], 4)
	h.PutUint32(msg[eventAt:], procListen)
	return os.NewSyscallError("send", unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
}

// drain keeps the socket's buffer from filling up: threads of the watched processes may come and go by the thousand.
func (c *connector) drain(sock *os.File) {
	conn, err := sock.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Read(func(fd uintptr) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.sock == sock {
			c.drainLocked(int(fd))
		}
		return c.sock != sock
	})
}

func (c *connector) drainLocked(fd int) {
	for {
		n, _, err := unix.Recvfrom(fd, c.buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			// Events are lost: what was heard until now may not be the last word.
			for _, e := range c.seen {
				*e = ending{}
			}
			continue
		case err != nil:
			return
		}
		c.hear(c.buf[:n])
	}
}

func (c *connector) hear(msg []byte) {
	if len(msg) < eventEnd || binary.NativeEndian.Uint32(msg[whatAt:]) != procEventExit {
		return
	}
	u32 := func(at int) int { return int(binary.NativeEndian.Uint32(msg[at:])) }
	if e := c.seen[u32(tgidAt)]; e != nil {
		e.last = unix.WaitStatus(u32(codeAt))
		if u32(pidAt) == u32(tgidAt) {
			e.leader, e.heard = e.last, true
		}
	}
}

// filter has the kernel drop what is not the end of a watched process: the machine may fork thousands of times a second.
func (c *connector) filter() error {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	ret := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	equal := func(k uint32, yes, no int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: bigEndian(k), Jt: uint8(yes), Jf: uint8(no)}
	}
	const all = 1 << 16
	prog := []unix.SockFilter{load(whatAt), equal(procEventExit, 1, 0), ret(0)}
	if len(c.seen) <= filtered {
		prog = append(prog, load(tgidAt))
		left := len(c.seen)
		for pid := range c.seen {
			prog = append(prog, equal(uint32(pid), left, 0)) // to the last instruction
			left--
		}
		prog = append(prog, ret(0))
	}
	prog = append(prog, ret(all))
	conn, err := c.sock.SyscallConn()
	if err != nil {
		return err
	}
	ferr := error(nil)
	err = conn.Control(func(fd uintptr) {
		ferr = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: unsafe.SliceData(prog)})
	})
	return errors.Join(err, os.NewSyscallError("SO_ATTACH_FILTER", ferr))
}

// bigEndian is what a filter, which reads in network order, makes of a number in the machine's order.
func bigEndian(k uint32) uint32 {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], k)
	return binary.BigEndian.Uint32(b[:])
}
