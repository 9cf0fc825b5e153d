package chaos

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// unknownStatus is what clients see of an exit that nobody saw.
const unknownStatus = 255

// load runs containers from their making to their end, and looks that each ends as it must.
type load struct {
	*client
	j     *journal
	sinks string // directory of their output
	r     *rand.Rand

	lives, execs, lines, cuts int
}

// judge compares a status with what it must be. An unknown one must be excused; known is false then.
func (l *load) judge(id, exec string, got, want uint32, begin time.Time, cut int) (known bool, err error) {
	switch {
	case got == want:
		return true, nil
	case got == unknownStatus:
		return false, l.j.excused(id, exec, begin, cut > 0)
	}
	return false, fmt.Errorf("%s: %q ended with %d, not %d", id, exec, got, want)
}

// neverRan says of a container whose start was cut off whether its init has ended with the status of one that could not
// execute its program: the shim was killed between two steps of letting it go.
func (l *load) neverRan(id string) (never bool, err error) {
	_, err = l.again("look at the task", func() error {
		resp, err := l.tasks.Get(l.ctx, &tasksapi.GetRequest{ContainerID: id})
		never = resp.GetProcess().GetStatus() == tasktypes.Status_STOPPED && resp.Process.ExitStatus == unknownStatus
		return err
	}, nil)
	return never, err
}

// numbered is a script that writes n numbered lines.
func numbered(n int) string {
	return fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo $i; i=$((i+1)); done; ", n)
}

// live is one container.
func (l *load) live(id string) error {
	code, kind, n := uint32(1+l.r.IntN(100)), l.r.IntN(3), l.r.IntN(200)
	scheme := sinks[l.r.IntN(len(sinks))]
	path := filepath.Join(l.sinks, id)
	script := numbered(n) + fmt.Sprintf("exit %d", code) // gone at once
	if kind > 0 {
		script = numbered(n) + fmt.Sprintf("sleep 1000 & trap 'exit %d' TERM; >/ready; wait", code)
	}
	begin := time.Now()
	if err := l.make(id, script, scheme+"://"+path); err != nil {
		return err
	}
	starting := time.Now()
	cut, err := l.start(id, "")
	if err != nil {
		return err
	}
	l.cuts += cut
	// A start whose shim is killed may be carried on by its successor, of which the client sees nothing.
	if cut > 0 && l.j.shimKilled(id, begin) || l.j.killedWithin(id, starting, time.Now()) {
		never, err := l.neverRan(id)
		if err != nil {
			return err
		}
		if never {
			lines, _, err := countFile(scheme, path)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			never = lines == 0
		}
		if never && code != unknownStatus {
			l.j.did("container ended before its program ran, its shim was killed while it started it", "%s", id)
			if err := l.remove(id, unknownStatus); err != nil {
				return err
			}
			return os.RemoveAll(path)
		}
	}
	signal, whole := uint32(unix.SIGTERM), kind < 2
	if kind > 0 {
		for i := range 1 + l.r.IntN(3) {
			ready, err := l.runExec(id, fmt.Sprintf("e%d", i), "until [ -e /ready ]; do usleep 1000; done; ")
			if err != nil {
				return err
			}
			whole = whole || ready
		}
		if kind == 2 {
			code, signal = 128+uint32(unix.SIGKILL), uint32(unix.SIGKILL)
		}
		if err := l.end(id, signal); err != nil {
			return err
		}
	}
	got, err := l.wait(id, "")
	if err != nil {
		return err
	}
	if _, err := l.judge(id, "", got, code, begin, 0); err != nil {
		return err
	}
	// What it wrote is kept before its end is told.
	if !whole { // it may have been killed before it had written all
		n = 0
	}
	if err := l.wrote(id, "", scheme, path, n, begin); err != nil {
		return err
	}
	l.lives++
	if err := l.remove(id, got); err != nil {
		return err
	}
	return os.Remove(path)
}

// wrote looks that n lines are in a sink; 0: any number.
func (l *load) wrote(id, exec, scheme, path string, n int, begin time.Time) error {
	lines, _, err := countFile(scheme, path)
	l.lines += lines
	switch {
	case err != nil:
		return err
	case lines == n, n == 0:
		return nil
	case l.j.orphaned(id, begin):
		l.j.did("process ended when neither shim nor daemon lived, its last lines unread", "%s %q: %d of %d", id, exec, lines, n)
		return nil
	}
	return fmt.Errorf("%s: %q wrote %d lines, %d of them are there", id, exec, n, lines)
}

// end signals a container until it has ended: the shell may not have set its trap yet.
func (l *load) end(id string, signal uint32) error {
	for {
		_, err := l.again("kill", func() error {
			_, err := l.tasks.Kill(l.ctx, &tasksapi.KillRequest{ContainerID: id, Signal: signal})
			return err
		}, missing)
		if err != nil && !missing(err) && !uncertain(err) {
			return fmt.Errorf("%s: %w", id, err)
		}
		resp, err := l.tasks.Get(l.ctx, &tasksapi.GetRequest{ContainerID: id})
		switch {
		case err == nil && !resp.Process.ExitedAt.AsTime().Before(l.j.begin):
			return nil
		case err != nil && status.Code(err) != codes.Unavailable:
			return fmt.Errorf("%s: %w", id, err)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-l.ctx.Done():
			return fmt.Errorf("%s: signal %d does not end it: %w", id, signal, l.ctx.Err())
		}
	}
}

// runExec is another process in a container, which does first, and then writes and ends. known is false when it is not
// known how it ended.
func (l *load) runExec(id, name, first string) (known bool, err error) {
	code, n, scheme := uint32(l.r.IntN(100)), l.r.IntN(50), sinks[l.r.IntN(len(sinks))]
	path := filepath.Join(l.sinks, id+"."+name)
	begin := time.Now()
	script := first + numbered(n) + fmt.Sprintf("usleep %d; exit %d", l.r.IntN(20000), code)
	got, cut, err := l.exec(id, name, script, scheme+"://"+path)
	if err != nil {
		return false, err
	}
	l.cuts += cut
	if known, err = l.judge(id, name, got, code, begin, cut); err != nil {
		return known, err
	}
	if known { // else it may never have been forked
		err = l.wrote(id, name, scheme, path, n, begin)
	}
	if err != nil {
		return known, err
	}
	l.execs++
	if err := l.deleteExec(id, name, got); err != nil {
		return known, err
	}
	_ = os.Remove(path)
	return known, nil
}

// ticker is a container that writes a line per millisecond until it is told to end.
type ticker struct {
	id, uri string
	code    uint32
	pid     uint32
	fds     uint32 // descriptors of its shim, at the beginning
	scheme  string
	path    string
	read    chan result // of a FIFO's reader
}

type result struct {
	lines int
	ended bool
	err   error
}

const ticking = `mkfifo /t; exec 3<>/t; trap end=1 TERM; i=0; while [ -z "$end" ]; do echo $i; i=$((i+1)); read -t 0.001 -u 3 x; done; echo end; exit %d`

// tick starts ticker n: into a FIFO that a client reads, or into one of the sinks.
func (l *load) tick(n int) (*ticker, error) {
	t := &ticker{id: fmt.Sprintf("ticker%d", n), code: uint32(10 + n), read: make(chan result, 1)}
	t.scheme = append([]string{"fifo"}, sinks...)[n%(1+len(sinks))]
	t.path = filepath.Join(l.sinks, t.id)
	t.uri = t.scheme + "://" + t.path
	if t.scheme == "fifo" {
		if err := unix.Mkfifo(t.path, 0o600); err != nil {
			return nil, err
		}
		go func() {
			f, err := os.Open(t.path) // waits for the shim's side
			if err != nil {
				t.read <- result{err: err}
				return
			}
			defer func() { _ = f.Close() }()
			p := &patient{f: f}
			n, ended, err := count("file", p, func() { p.over.Store(true) })
			t.read <- result{n, ended, err}
		}()
	}
	if err := l.make(t.id, fmt.Sprintf(ticking, t.code), t.uri); err != nil {
		return nil, err
	}
	if _, err := l.start(t.id, ""); err != nil {
		return nil, err
	}
	resp, err := l.tasks.Get(l.ctx, &tasksapi.GetRequest{ContainerID: t.id})
	t.pid = resp.GetProcess().GetPid()
	return t, err
}

// finish gives the lines of a ticker that has ended.
func (t *ticker) finish(within time.Duration) (int, error) {
	var r result
	if t.scheme == "fifo" {
		select {
		case r = <-t.read:
		case <-time.After(within):
			return 0, fmt.Errorf("%s: its client sees no end of the output", t.id)
		}
	} else {
		r.lines, r.ended, r.err = countFile(t.scheme, t.path)
	}
	if r.err == nil && !r.ended {
		r.err = fmt.Errorf("no last line behind %d", r.lines)
	}
	if r.err != nil {
		return r.lines, fmt.Errorf("%s (%s): %w", t.id, t.scheme, r.err)
	}
	return r.lines, nil
}
