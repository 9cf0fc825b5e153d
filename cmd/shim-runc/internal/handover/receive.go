package handover

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/protos/shimstate"
)

// Received is what the program before this one has handed over.
type Received struct {
	*shimstate.Handover
	Failed string // why a successor gave the process back to us; empty when we are the successor
	memfd  int
}

// Receive gives what was handed over, nil if nothing was: then this program was started as others are. After an error
// nothing can be done but to end. It takes the traces out of the environment.
func Receive() (*Received, error) {
	at := os.Getenv(envRecord)
	if at == "" {
		return nil, nil
	}
	r := &Received{Failed: os.Getenv(envFailed)}
	_ = os.Unsetenv(envRecord)
	_ = os.Unsetenv(envFailed)
	// The kernel has named the process after the descriptor that it was executed from.
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	var err error
	if r.memfd, err = strconv.Atoi(at); err != nil {
		return nil, fmt.Errorf("malformed %s=%q", envRecord, at)
	}
	var st unix.Stat_t
	if err := unix.Fstat(r.memfd, &st); err != nil || st.Size > longest {
		return nil, fmt.Errorf("cannot read the record of the hand-over: %d bytes, error %w", st.Size, err)
	}
	data := make([]byte, st.Size)
	if n, err := unix.Pread(r.memfd, data, 0); err != nil || n != len(data) {
		return nil, fmt.Errorf("cannot read the record of the hand-over: %d bytes of %d, error %w", n, len(data), err)
	}
	r.Handover, err = Read(data)
	return r, err
}

// File gives a copy of a descriptor of the record.
func (r *Received) File(fd int32, name string) (*os.File, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d (%s) was not handed over: %w", fd, name, err)
	}
	return os.NewFile(uintptr(n), name), nil
}

// Done closes what the record names: this program goes on, and has copies.
func (r *Received) Done() {
	_ = unix.Close(int(r.Socket))
	for _, c := range r.Connections {
		_ = unix.Close(int(c.Fd))
	}
	for _, d := range r.Held {
		_ = unix.Close(int(d.Fd))
	}
	_ = unix.Close(int(r.OldBinary))
	_ = unix.Close(r.memfd)
}

// Back gives the process back to the program that was before. It returns only an error: also when that one is us.
func (r *Received) Back(reason error) error {
	if r.Failed != "" {
		return fmt.Errorf("neither program can go on: %w; the other one: %s", reason, r.Failed)
	}
	why := reason.Error()
	if why == "" {
		why = "it does not say why"
	}
	return replace("/proc/self/fd/"+strconv.Itoa(int(r.OldBinary)), append(environment(), envRecord+"="+strconv.Itoa(r.memfd), envFailed+"="+why))
}
