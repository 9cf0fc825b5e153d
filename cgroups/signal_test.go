package cgroups

import (
	"errors"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSignal: only who is still a member when it has been got hold of is signalled; who has ended is passed over.
func TestSignal(t *testing.T) {
	start := func() *exec.Cmd {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd
	}
	member, stranger, gone := start(), start(), start()
	if err := gone.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = gone.Wait()
	pids := []int{member.Process.Pid, stranger.Process.Pid, gone.Process.Pid}
	members := func() ([]int, error) { return []int{member.Process.Pid, gone.Process.Pid}, nil }
	if err := Signal(pids, unix.SIGKILL, members); err != nil {
		t.Error(err)
	}
	if err := member.Wait(); err == nil || member.ProcessState.Sys() == nil {
		t.Errorf("the member was not killed: %v", err)
	}
	if err := stranger.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the stranger: %v", err)
	}
	failed := errors.New("no list")
	if err := Signal(pids[1:2], unix.SIGKILL, func() ([]int, error) { return nil, failed }); !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	if err := stranger.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the stranger, when nobody knows the members: %v", err)
	}
}
