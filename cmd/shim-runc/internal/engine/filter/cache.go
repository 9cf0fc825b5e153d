//go:build cgo && seccomp

// Package filter keeps compiled seccomp filters, so that a profile is compiled once in a boot of the machine, not again for
// every container and every exec. Compiling is most of what a process with a usual profile takes to start.
//
// How it goes: libcontainer has each container's init and each exec compile and load the filter for itself. A shim that
// finds the compiled one in its Cache hands it over as a file (see Take); interpose.c has libcontainer get it instead of
// computing it, provided that it was made by exactly the calls that libcontainer makes now. When there is none, all goes
// as without this package, and the shim has one compiled for the next time, by a process that never was in a container.
package filter

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi/version"
)

// Verb is the argument with which this program is to go to Main.
const Verb = "compile-seccomp"

const (
	// compiles bounds the time that a profile takes to compile: it is usually less than 0.1 s.
	compiles = 20 * time.Second
	// kept is how many filters there are in a directory; the oldest go first.
	kept = 64
)

// Cache keeps compiled filters in a directory, for all shims of the machine. Its methods may be called at once by any
// number of goroutines and processes. A nil Cache has nothing and keeps nothing.
type Cache struct {
	// Dir is made when it is needed. It must be the caller's alone: whoever can write to it decides what containers may do.
	Dir string
	// Reaper waits for the process that compiles. It is needed for Fill only.
	Reaper *reaper.Reaper
}

// Profile is a seccomp profile of libcontainer, with its name in a Cache.
type Profile struct {
	name   string
	config []byte
}

// NewProfile gives the Profile of config, or nil if that is nil.
func NewProfile(config *configs.Seccomp) (*Profile, error) {
	if config == nil {
		return nil, nil
	}
	data, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("cannot write down a seccomp profile: %w", err)
	}
	sum := sha256.New()
	_, _ = fmt.Fprintf(sum, "%s %s\n", version.Version, version.Revision)
	_, _ = sum.Write(data)
	return &Profile{name: hex.EncodeToString(sum.Sum(nil)), config: data}, nil
}

// Open gives the compiled filter of p in a sealed file that Take accepts, which the caller closes. The file is nil when
// there is no such filter, or when the directory is not the caller's alone, which is then the error.
func (c *Cache) Open(p *Profile) (*os.File, error) {
	if c == nil || p == nil {
		return nil, nil
	}
	if err := c.private(); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	from, err := os.Open(filepath.Join(c.Dir, p.name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = from.Close() }()
	// A file of its own: what can be reached through a container's /proc/PID/fd must be nothing that can be written to.
	file, err := memfd("seccomp-filter")
	if err != nil {
		return nil, err
	}
	if err = transfer(file, from); err == nil {
		_, err = unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		_ = file.Close()
		_ = os.Remove(from.Name()) // it is compiled again
		return nil, fmt.Errorf("cannot hand over the seccomp filter %s: %w", from.Name(), err)
	}
	return file, nil
}

// transfer copies a filter.
func transfer(to, from *os.File) error {
	st, err := from.Stat()
	if err != nil {
		return err
	}
	head := make([]byte, headSize)
	if _, err := from.ReadAt(head, 0); err != nil {
		return fmt.Errorf("it is too short: %w", err)
	}
	if _, _, err := lengths(head, st.Size()); err != nil {
		return err
	}
	if n, err := unix.Sendfile(int(to.Fd()), int(from.Fd()), nil, int(st.Size())); err != nil || int64(n) != st.Size() {
		return fmt.Errorf("%d of %d bytes were copied: %w", n, st.Size(), cmp.Or(err, io.ErrShortWrite))
	}
	return nil
}

// private says whether the directory is the caller's alone.
func (c *Cache) private() error {
	st, err := os.Lstat(c.Dir)
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || !st.IsDir() || int(sys.Uid) != os.Geteuid() || st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not used for compiled seccomp filters: it must be a directory of mode 0700 that belongs to uid %d", c.Dir, os.Geteuid())
	}
	return nil
}

// Fill compiles p for those who Open it later, in a process of this program. It does nothing when another shim is at it.
func (c *Cache) Fill(p *Profile) error {
	if c == nil || p == nil {
		return nil
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	if err := c.private(); err != nil {
		return err
	}
	unfinished := filepath.Join(c.Dir, p.name+".new")
	out, err := os.OpenFile(unfinished, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if st, err := os.Lstat(unfinished); err == nil && time.Since(st.ModTime()) > 2*compiles {
			return os.Remove(unfinished) // of a shim that died; whoever comes next compiles it
		}
		return nil
	}
	if err != nil {
		return err
	}
	err = c.compile(p, out)
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(unfinished, filepath.Join(c.Dir, p.name))
	}
	if err != nil {
		_ = os.Remove(unfinished)
		return fmt.Errorf("cannot compile a seccomp profile: %w", err)
	}
	c.prune()
	return nil
}

// compile runs Compile in a process of this program.
func (c *Cache) compile(p *Profile, out *os.File) error {
	in, err := memfd("seccomp-profile")
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	if _, err := in.WriteAt(p.config, 0); err != nil {
		return err
	}
	said, err := memfd("seccomp-stderr")
	if err != nil {
		return err
	}
	defer func() { _ = said.Close() }()
	cmd := exec.Command("/proc/self/exe", Verb)
	cmd.Args[0], cmd.Env = os.Args[0], []string{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, said
	proc, err := c.Reaper.ForkWaited(func() (int, error) {
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		return cmd.Process.Pid, nil
	}, func() (*os.ProcessState, error) { return cmd.Process.Wait() })
	if err != nil {
		return err
	}
	defer proc.Forget()
	limit := time.NewTimer(compiles)
	defer limit.Stop()
	select {
	case <-proc.Done():
	case <-limit.C:
		_ = proc.Signal(unix.SIGKILL)
		<-proc.Done()
		return fmt.Errorf("it took longer than %s", compiles)
	}
	if s := proc.Exit().Status; s != 0 {
		text := make([]byte, 1024)
		n, _ := said.ReadAt(text, 0)
		return fmt.Errorf("exit status %d: %s", s, bytes.TrimSpace(text[:n]))
	}
	return nil
}

// prune removes the oldest filters when there are more than are kept.
func (c *Cache) prune() {
	all, err := os.ReadDir(c.Dir)
	if err != nil || len(all) <= kept {
		return
	}
	age := func(e fs.DirEntry) time.Time {
		if info, err := e.Info(); err == nil {
			return info.ModTime()
		}
		return time.Time{}
	}
	slices.SortFunc(all, func(a, b fs.DirEntry) int { return age(a).Compare(age(b)) })
	for _, e := range all[:len(all)-kept] {
		_ = os.Remove(filepath.Join(c.Dir, e.Name()))
	}
}
