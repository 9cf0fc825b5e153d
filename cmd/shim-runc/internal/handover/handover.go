// Package handover replaces the program of this process by another (execve(2)) and carries a record and descriptors over:
// the process keeps its pid, its children and whatever is open. It does not know what the descriptors are for.
//
// The record is in a sealed memfd, whose number is in the environment, and so are the descriptors that it names: they are
// left alone until the successor says that it has come to stand (Received.Done). Until then it can go back to the program
// that was before (Received.Back), which finds everything as it was.
package handover

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/protos/shimstate"
)

// Schema is the version of the record that this code writes. It reads one version more or less.
const Schema = 1

// The environment of a program that replaces another.
const (
	envRecord = "MANAGERD_HANDOVER"        // number of the memfd
	envFailed = "MANAGERD_HANDOVER_FAILED" // why the successor gave the process back; only then set
)

// CheckVerb is the verb under which a program says whether it could take over the record on its standard input.
const CheckVerb = "handover-check"

// checking is how long that may take.
const checking = 5 * time.Second

// longest is the most bytes that a record may have.
const longest = 64 << 20

// Read reads a record and refuses one that it does not understand.
func Read(data []byte) (*shimstate.Handover, error) {
	h := &shimstate.Handover{}
	if err := h.Unmarshal(data); err != nil {
		return nil, fmt.Errorf("malformed hand-over: %w", err)
	}
	if h.Schema+1 < Schema || h.Schema > Schema+1 || h.Schema == 0 {
		return nil, fmt.Errorf("the hand-over has schema %d, known are those next to %d", h.Schema, Schema)
	}
	return h, nil
}

// Check is what CheckVerb does: it says yes, or gives the reason why not.
func Check(stdin io.Reader, stdout io.Writer) error {
	data, err := io.ReadAll(io.LimitReader(stdin, longest))
	if err != nil {
		return err
	}
	if _, err = Read(data); err != nil {
		return err
	}
	_, err = io.WriteString(stdout, yes)
	return err
}

// yes is what a program prints that could take over: many a program ends with success whatever it is asked.
const yes = "ready to take over\n"

// Open opens a program and asks it whether it could take over h. run is to run what forks and waits. The caller closes
// the file.
func Open(path string, h *shimstate.Handover, run func(func() error) error) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%q is not an absolute path", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*os.File, error) {
		_ = f.Close()
		return nil, fmt.Errorf("%s was refused: %w", path, err)
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return fail(errors.Join(errors.New("not a regular file"), err))
	}
	data, err := h.Marshal()
	if err != nil {
		return fail(err)
	}
	var said, complained bytes.Buffer
	cmd := exec.Command(self(f), CheckVerb)
	cmd.Args[0] = path
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &said, &complained
	cmd.WaitDelay = checking / 5
	err = run(func() error {
		if err := cmd.Start(); err != nil {
			return err
		}
		timer := time.AfterFunc(checking, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		return cmd.Wait()
	})
	if err != nil {
		return fail(fmt.Errorf("%w: %.500s", err, strings.TrimSpace(complained.String())))
	}
	if said.String() != yes {
		return fail(errors.New("it does not know how to take over from a running shim"))
	}
	return f, nil
}

// self names an open file, whatever has become of its path.
func self(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(number(f)) }

// number is f's descriptor; unlike Fd it leaves the mode of the file alone.
func number(f *os.File) int {
	n := -1
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { n = int(fd) })
	}
	return n
}

// Bundle are the descriptors that go with a record.
type Bundle struct{ files []*os.File }

// Add takes f over and gives the number under which the successor finds it.
func (b *Bundle) Add(f *os.File) int32 {
	b.files = append(b.files, f)
	return int32(number(f))
}

// Close closes them all, when the replacement has failed.
func (b *Bundle) Close() {
	for _, f := range b.files {
		_ = f.Close()
	}
	b.files = nil
}

// stubborn are the signals that must not end the process between two programs. They are ignored then: the successor is to
// catch them.
var stubborn = []os.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE, unix.SIGQUIT, unix.SIGUSR1}

// Exec replaces this program by the one in binary, under the same command line, and hands over h, whose descriptors are
// in b. It returns only an error; nothing but the handling of signals has changed then. Nothing may fork meanwhile.
func Exec(binary *os.File, h *shimstate.Handover, b *Bundle) error {
	old, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("there would be no way back: %w", err)
	}
	h.OldBinary = b.Add(old)
	data, err := h.Marshal()
	if err != nil {
		return err
	}
	memfd, err := seal(data)
	if err != nil {
		return err
	}
	n := b.Add(memfd)
	for _, f := range b.files {
		if err := inherit(number(f), true); err != nil {
			return err
		}
	}
	err = replace(self(binary), append(environment(), envRecord+"="+strconv.Itoa(int(n))))
	for _, f := range b.files {
		_ = inherit(number(f), false)
	}
	return err
}

func replace(path string, env []string) error {
	signal.Ignore(stubborn...)
	return fmt.Errorf("execve: %w", unix.Exec(path, os.Args, env))
}

// environment is ours without what is in it for us.
func environment() []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, envRecord+"=") && !strings.HasPrefix(e, envFailed+"=") {
			env = append(env, e)
		}
	}
	return env
}

func seal(data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("handover", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("cannot make the record of the hand-over: %w", err)
	}
	f := os.NewFile(uintptr(fd), "handover")
	if _, err = f.Write(data); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("cannot write the record of the hand-over: %w", err)
	}
	return f, nil
}

func inherit(fd int, on bool) error {
	flags := unix.FD_CLOEXEC
	if on {
		flags = 0
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, flags); err != nil {
		return fmt.Errorf("cannot hand over descriptor %d: %w", fd, err)
	}
	return nil
}
