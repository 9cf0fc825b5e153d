package criu

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// lock is what criu gives to iptables-restore(8) at the dump and at the restore.
const lock = `*filter
:CRIU - [0:0]
-I INPUT -j CRIU
-I OUTPUT -j CRIU
-A CRIU -m mark --mark 0xC114 -j ACCEPT
-A CRIU -j DROP
COMMIT
`

// inNetwork runs fn in a network namespace of its own, whose path it is given.
func inNetwork(t *testing.T, fn func(path string)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		fn(fmt.Sprintf("/proc/%d/task/%d/ns/net", unix.Getpid(), unix.Gettid()))
	}()
	<-done
}

// TestUnlock: of a lock that was made twice nothing is left, and all other rules stay.
func TestUnlock(t *testing.T) {
	inNetwork(t, func(path string) {
		for _, tool := range []string{"iptables", "ip6tables"} {
			run := func(input, name string, args ...string) string {
				cmd := exec.Command(name, args...)
				cmd.Stdin = strings.NewReader(input)
				out, err := output(cmd)
				if err != nil {
					t.Error(err)
				}
				return string(out)
			}
			run("", tool, "-w", "-A", "INPUT", "-p", "tcp", "--dport", "7", "-j", "DROP")
			before := run("", tool, "-w", "-S")
			for range 2 {
				run(lock, tool+"-restore", "-w", "--noflush")
			}
			if locked := run("", tool, "-w", "-S"); strings.Count(locked, "-A INPUT -j CRIU") != 2 {
				t.Errorf("%s: it is not locked twice: %s", tool, locked)
			}
			for range 2 { // the second time there is nothing to do
				if err := Unlock(path); err != nil {
					t.Error(err)
				}
				if after := run("", tool, "-w", "-S"); after != before {
					t.Errorf("%s: the rules are\n%s, and were\n%s", tool, after, before)
				}
			}
		}
	})
	missing := filepath.Join(t.TempDir(), "none")
	if err := Unlock(missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("of a namespace that is not there: %v", err)
	}
}
