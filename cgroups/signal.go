package cgroups

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Signal sends a signal to those of pids that members lists as well, after each has been got hold of (pidfd_open(2)): a
// number that has passed to a stranger since pids was read reaches nobody. Those that have ended are passed over.
func Signal(pids []int, signal unix.Signal, members func() ([]int, error)) error {
	held := make(map[int]int, len(pids))
	defer func() {
		for _, fd := range held {
			_ = unix.Close(fd)
		}
	}()
	var errs []error
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			held[pid] = fd
		} else if !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("cannot signal process %d: %w", pid, err))
		}
	}
	now, err := members()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for pid, fd := range held {
		if !slices.Contains(now, pid) {
			continue
		}
		if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("cannot signal process %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}
