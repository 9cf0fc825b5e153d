package wire

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// envState tells the test binary that it is a server, and where its predecessor's state is.
const envState = "WIRE_TEST_STATE"

func TestMain(m *testing.M) {
	if fd := os.Getenv(envState); fd != "" {
		fmt.Fprintln(os.Stderr, "server:", serveState(fd))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// handed is what one image of the server gives the next, by way of a memfd.
type handed struct {
	Generation uint32
	Socket     int
	Conns      []handedConn
}

type handedConn struct {
	FD     int
	Unread []byte
}

// serveState is the server program: "Next" makes it replace itself, "End" answers the Waits, with generation and pid.
func serveState(fd string) error {
	n, err := strconv.Atoi(fd)
	if err != nil {
		return err
	}
	memfd := os.NewFile(uintptr(n), "state")
	var h handed
	if err := json.NewDecoder(memfd).Decode(&h); err != nil {
		return err
	}
	_ = memfd.Close()
	var conns []Conn
	for _, c := range h.Conns {
		conns = append(conns, Conn{File: os.NewFile(uintptr(c.FD), "connection"), Unread: c.Unread})
	}
	l, err := Listen(os.NewFile(uintptr(h.Socket), "socket"), Options{Parks: func(_, method string) bool { return method == "Wait" }}, conns)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	me := wrapperspb.UInt64(uint64(h.Generation)<<32 | uint64(os.Getpid()))
	ended, next := make(chan struct{}), make(chan struct{}, 1)
	now := func(do func()) ttrpc.Method {
		return func(context.Context, func(any) error) (any, error) { do(); return me, nil }
	}
	server.RegisterService(service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Wait": func(ctx context.Context, _ func(any) error) (any, error) {
			select {
			case <-ended:
				return me, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
		"Who": now(func() {}), "End": now(func() { close(ended) }), "Next": now(func() { next <- struct{}{} }),
	}})
	go func() { _ = server.Serve(context.Background(), l) }()
	<-next
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := l.Freeze(ctx); err != nil {
		return err
	}
	socket, conns, err := l.HandOver()
	if err != nil {
		return err
	}
	keep := func(f *os.File) int {
		c, err := f.SyscallConn()
		if err != nil {
			panic(err)
		}
		number := -1
		_ = c.Control(func(fd uintptr) {
			number = int(fd)
			_, _ = unix.FcntlInt(fd, unix.F_SETFD, 0)
		})
		return number
	}
	to := handed{Generation: h.Generation + 1, Socket: keep(socket)}
	for _, c := range conns {
		to.Conns = append(to.Conns, handedConn{FD: keep(c.File), Unread: c.Unread})
	}
	out, err := stateFile(to)
	if err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, []string{envState + "=" + strconv.Itoa(keep(out))})
}

// stateFile is h in a memfd, to be read from its beginning.
func stateFile(h handed) (*os.File, error) {
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "state")
	if err := json.NewEncoder(f).Encode(h); err != nil {
		return nil, err
	}
	_, err = f.Seek(0, 0)
	return f, err
}

// TestExecve is a server that replaces its own program fifty times under its clients: same pid, same connections, no
// call fails, and the Waits that were sent early are answered by the last image.
func TestExecve(t *testing.T) {
	const clients, generations = 3, 50
	ctx := within(t)
	socket, path := listening(t)
	state, err := stateFile(handed{Socket: 3})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{envState + "=4"}
	cmd.ExtraFiles = []*os.File{socket, state}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = socket.Close(), state.Close()
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	pid := uint64(cmd.Process.Pid)

	waits := make(chan string, clients)
	var all []*ttrpc.Client
	for range clients {
		c := dial(t, path)
		all = append(all, c)
		if err := c.Call(ctx, service, "Who", &wrapperspb.BoolValue{}, &wrapperspb.UInt64Value{}); err != nil {
			t.Fatal(err)
		}
		go func() {
			var n wrapperspb.UInt64Value
			err := c.Call(ctx, service, "Wait", &wrapperspb.BoolValue{}, &n)
			waits <- fmt.Sprint(n.Value, err)
		}()
	}
	var pauses []time.Duration
	for n := range uint64(generations) {
		c, other := all[int(n)%clients], all[int(n+1)%clients]
		var who wrapperspb.UInt64Value
		if err := c.Call(ctx, service, "Next", &wrapperspb.BoolValue{}, &who); err != nil {
			t.Fatal(err)
		}
		longest := time.Duration(0)
		for who.Value>>32 != n+1 {
			begin := time.Now()
			if err := other.Call(ctx, service, "Who", &wrapperspb.BoolValue{}, &who); err != nil {
				t.Fatalf("a call during change %d: %v", n, err)
			}
			longest = max(longest, time.Since(begin))
		}
		if got := who.Value & (1<<32 - 1); got != pid {
			t.Fatalf("pid %d, want %d", got, pid)
		}
		pauses = append(pauses, longest)
	}
	if err := all[0].Call(ctx, service, "End", &wrapperspb.BoolValue{}, &wrapperspb.UInt64Value{}); err != nil {
		t.Fatal(err)
	}
	for range clients {
		if got, want := <-waits, fmt.Sprint(uint64(generations)<<32|pid, nil); got != want {
			t.Errorf("Wait: %s, want %s", got, want)
		}
	}
	slices.Sort(pauses)
	t.Logf("longest call during a change: p50 %s, max %s", pauses[len(pauses)/2], pauses[len(pauses)-1])
}
