package shims

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestKillBounded: a shim that was killed and does not end, as one that waits for a file system, is not waited for without an end.
func TestKillBounded(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &shimProcess{cmd: cmd, ended: make(chan struct{})} // nobody says that it has ended
	done := make(chan error, 1)
	go func() { done <- p.kill() }()
	select {
	case err := <-done:
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "does not end") {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it waits")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it was not killed")
	}
	close(p.ended)
	if err := p.kill(); err != nil {
		t.Error(err)
	}
}
