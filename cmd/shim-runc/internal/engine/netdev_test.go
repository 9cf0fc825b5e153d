package engine

import (
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// inNetworkNamespace runs fn in a network namespace of its own, with what it starts.
func inNetworkNamespace(t *testing.T, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		fn()
	}()
	<-done
}

// command runs a program, whose exit status the reaper does not take, and gives what it printed.
func command(t *testing.T, name string, args ...string) (out string) {
	t.Helper()
	err := reap.Guard(func() error {
		data, err := exec.Command(name, args...).CombinedOutput()
		out = string(data)
		if err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

// TestNetDevices: the shim's device is the container's, under the name that it shall have there, and keeps its address.
func TestNetDevices(t *testing.T) {
	f := newFixture(t)
	var c, other *Container
	inNetworkNamespace(t, func() {
		command(t, "ip", "link", "add", "row0", "type", "veth", "peer", "name", "row1")
		command(t, "ip", "address", "add", "192.0.2.7/24", "dev", "row0")
		command(t, "ip", "link", "set", "row0", "up")
		// The containers live in the test, and the goroutine in it.
		c = f.create(t, IO{}, func(s *specs.Spec) {
			addNamespace(s, specs.NetworkNamespace, "")
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"row0": {Name: "eth9"}}
		}, "sleep", "1000")
		other = f.create(t, IO{}, func(s *specs.Spec) {
			addNamespace(s, specs.NetworkNamespace, "")
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"row1": {}}
		}, "sleep", "1000")
		f.refused(t, func(s *specs.Spec) {
			addNamespace(s, specs.NetworkNamespace, "")
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"row7": {}}
		}, "row7")
	})
	if t.Failed() || c == nil || other == nil {
		t.FailNow()
	}
	start(t, c)
	start(t, other)
	if got := f.execShell(t, c, func(*specs.Process) {}, "ip -o -4 addr show eth9"); !strings.Contains(got, "192.0.2.7/24") {
		t.Errorf("eth9 of the container: %q", got)
	}
	if got := f.execShell(t, other, func(*specs.Process) {}, "ip -o link show row1"); !strings.Contains(got, "row1") {
		t.Errorf("row1 of the other: %q", got)
	}
}
