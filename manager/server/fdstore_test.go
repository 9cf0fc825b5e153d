package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/parking"
	"github.com/managerd/managerd/protos/shimstate"
	wire "github.com/managerd/managerd/shimapi/parking"
)

// serviceManager is the part of one that keeps descriptors (sd_notify(3)).
type serviceManager struct {
	t    *testing.T
	conn *net.UnixConn
	kept map[string]*os.File
}

// next takes one message.
func (m *serviceManager) next() {
	m.t.Helper()
	data, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*10))
	if err := m.conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		m.t.Fatal(err)
	}
	n, on, _, _, err := m.conn.ReadMsgUnix(data, oob)
	if err != nil {
		m.t.Fatal(err)
	}
	lines := strings.Split(string(data[:n]), "\n")
	name := ""
	for _, line := range lines {
		if v, ok := strings.CutPrefix(line, "FDNAME="); ok {
			name = v
		}
	}
	if name == "" || len(name) > 14 {
		m.t.Fatalf("the name in %q", lines)
	}
	switch {
	case slices.Contains(lines, "FDSTORE=1"):
		msgs, err := unix.ParseSocketControlMessage(oob[:on])
		if err != nil || len(msgs) != 1 || !slices.Contains(lines, "FDPOLL=0") {
			m.t.Fatalf("%q with %d control messages, %v", lines, len(msgs), err)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			m.t.Fatalf("%q with %v, %v", lines, fds, err)
		}
		m.kept[name] = os.NewFile(uintptr(fds[0]), name)
	case slices.Contains(lines, "FDSTOREREMOVE=1"):
		if m.kept[name] == nil {
			m.t.Errorf("%s is not kept", name)
			return
		}
		_ = m.kept[name].Close()
		delete(m.kept, name)
	default:
		m.t.Errorf("message %q", lines)
	}
}

// terminal makes one: the side that a shim has, and that of a container.
func terminal(t *testing.T) (master, user *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if user, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = user.Close() })
	return master, user
}

// TestFDStore: a terminal lives on when everybody who has it is dead: the service manager has it, and the next daemon takes
// it back and gives it away when its task is gone.
func TestFDStore(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &serviceManager{t: t, conn: conn, kept: map[string]*os.File{}}
	t.Cleanup(func() {
		for _, f := range m.kept {
			_ = f.Close()
		}
		_ = conn.Close()
	})
	open := func(kept ...*os.File) *parking.Lot {
		lot, err := parking.Open(filepath.Join(dir, "park"), &fdStore{socket: path, kept: kept}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(lot.Close)
		return lot
	}
	lot := open()
	master, user := terminal(t)
	shim, err := wire.Dial(t.Context(), filepath.Join(dir, "park"))
	if err != nil {
		t.Fatal(err)
	}
	parcel := &shimstate.Parcel{Namespace: "ns", ContainerId: "c", ExecId: "e", Kinds: []string{wire.Terminal}}
	if err := wire.Send(shim, parcel, []*os.File{master}); err != nil {
		t.Fatal(err)
	}
	m.next()
	_ = shim.Close()
	lot.Close()
	_ = master.Close()
	hungUp := func() bool {
		fds := []unix.PollFd{{Fd: int32(user.Fd()), Events: unix.POLLOUT}}
		if _, err := unix.Poll(fds, 0); err != nil {
			t.Fatal(err)
		}
		return fds[0].Revents&unix.POLLHUP != 0
	}
	if hungUp() {
		t.Error("the terminal hangs up though the service manager has it")
	}
	var kept []*os.File
	for _, f := range m.kept { // as the next process gets them
		n, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, os.NewFile(uintptr(n), f.Name()))
	}
	lot = open(kept...)
	ours, theirs, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = theirs.Close() }()
	if err := errors.Join(lot.HandOver(ours, "ns", "c"), ours.Close()); err != nil {
		t.Fatal(err)
	}
	successor, err := wire.Conn(theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = successor.Close() }()
	p, files, err := wire.Receive(successor)
	if err != nil || p.ExecId != "e" || p.Kinds[0] != wire.Terminal {
		t.Fatalf("%v, %v", p, err)
	}
	if _, err := user.WriteString("still here"); err != nil {
		t.Error(err)
	}
	text := make([]byte, 100)
	n, err := files[0].Read(text)
	if err != nil || string(text[:n]) != "still here" {
		t.Errorf("%q, %v", text[:n], err)
	}
	_ = files[0].Close()
	lot.Drop("ns", "c")
	m.next()
	if !hungUp() || len(m.kept) != 0 {
		t.Errorf("of a task that is gone is kept: %v", m.kept)
	}
}
