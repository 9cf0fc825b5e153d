package criu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Unlock removes what is left of criu's lock in a network namespace, given by its path: the chain CRIU of iptables(8), which
// drops what is not criu's own, and the rules that jump there. criu makes the lock at the dump and, into a namespace that is
// not its to restore (as runc asks of every restore), once more at the restore; then it undoes one of the two
// (https://github.com/checkpoint-restore/criu/pull/2323). It forks, and wants the fork guard held.
func Unlock(netns string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			_ = unix.Close(fd)
		}
		if err != nil {
			done <- fmt.Errorf("cannot enter network namespace %s: %w", netns, err)
			return
		}
		done <- errors.Join(unlock("iptables"), unlock("ip6tables"))
	}()
	return <-done
}

// unlock removes the lock that one tool knows of, in the network namespace of the calling thread.
func unlock(tool string) error {
	if _, err := exec.LookPath(tool); errors.Is(err, exec.ErrNotFound) {
		return nil // criu locks by it or not at all
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil && tool == "ip6tables" {
		return nil
	}
	rules, err := output(exec.Command(tool, "-w", "-S"))
	if err != nil {
		return err
	}
	undo := unlocking(string(rules))
	if undo == "" {
		return nil
	}
	restore := exec.Command(tool+"-restore", "-w", "--noflush")
	restore.Stdin = strings.NewReader(undo)
	_, err = output(restore)
	return err
}

// unlocking is the input of iptables-restore(8) that removes the lock from rules, as "iptables -S" prints them.
func unlocking(rules string) string {
	var jumps, chain strings.Builder
	for line := range strings.Lines(rules) {
		line = strings.TrimSpace(line)
		if jump, ok := strings.CutPrefix(line, "-A "); ok && strings.HasSuffix(jump, " -j CRIU") {
			fmt.Fprintf(&jumps, "-D %s\n", jump)
		}
		if line == "-N CRIU" {
			chain.WriteString("-F CRIU\n-X CRIU\n")
		}
	}
	if jumps.Len()+chain.Len() == 0 {
		return ""
	}
	return "*filter\n" + jumps.String() + chain.String() + "COMMIT\n"
}

// output runs a command; its error has what that said.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}
