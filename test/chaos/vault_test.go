package chaos

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi/parking"
)

// heldTerminal is the life of a container with a terminal, whose shim and daemon are killed together, so that only the service
// manager has the terminal: it goes on.
func (r *run) heldTerminal() error {
	const code = 42
	r.terminal = filepath.Join(r.d.Dir, r.id)
	tty, err := openTerminal(r.terminal)
	if err != nil {
		return err
	}
	defer tty.close()
	script := fmt.Sprintf("test -t 0 || exit 1; while read x; do [ $x = end ] && exit %d; echo got $x; done", code)
	if err := r.make(r.id, script, ""); err != nil {
		return err
	}
	if _, err := r.start(r.id, ""); err != nil {
		return err
	}
	deadline, _ := r.ctx.Deadline()
	hit := func() bool {
		_, err := os.Stat(filepath.Join(r.armory, r.name+".hit"))
		return err == nil
	}
	if r.name == "parking.vault.made" || r.name == "parking.vault.kept" {
		// By the daemon that keeps the terminal: those after it find it kept.
		if err := r.await("somebody keeps the terminal", hit); err != nil {
			return err
		}
	}
	for i := range 3 {
		if i > 0 {
			if err := r.await("the service manager has the terminal", r.kept); err != nil {
				return err
			}
			r.watch.kill(r.d, func() {
				for _, v := range r.m.victims(func(id string) bool { return id == r.id }) {
					_ = v.signal(unix.SIGKILL)
					v.close()
				}
			})
		}
		word := fmt.Sprint("word", i)
		if err := tty.say(word, "got "+word, deadline); err != nil {
			return fmt.Errorf("the terminal, when daemon and shim have been killed %d times: %w", i, err)
		}
	}
	if _, err := tty.in.WriteString("end\n"); err != nil {
		return err
	}
	got, err := r.wait(r.id, "")
	if err != nil || got != code {
		return fmt.Errorf("it ended with %d, not %d: %v", got, code, err)
	}
	r.life()
	if err := r.remove(r.id, got); err != nil {
		return err
	}
	return r.await("somebody gets there", hit) // the vault follows behind
}

func (r *run) await(what string, is func() bool) error {
	for !is() {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-r.ctx.Done():
			return fmt.Errorf("in vain: %s: %w", what, r.ctx.Err())
		}
	}
	return nil
}

// kept says whether the service manager has the terminal of the container.
func (r *run) kept() (is bool) {
	_ = r.store.Each(func(f *os.File) {
		c, err := f.SyscallConn()
		if err != nil {
			return
		}
		_ = c.Control(func(fd uintptr) {
			p, files, err := parking.Peek(int(fd))
			for _, f := range files {
				_ = f.Close()
			}
			is = is || err == nil && p.ContainerId == r.id && p.ExecId == "" && slices.Contains(p.Kinds, parking.Terminal)
		})
	})
	return is
}

// tty is the client's side of a terminal.
type tty struct {
	in, out *os.File
	lines   *bufio.Reader
}

func openTerminal(path string) (*tty, error) {
	t := &tty{}
	for _, f := range []struct {
		path string
		to   **os.File
	}{{path + ".in", &t.in}, {path + ".out", &t.out}} {
		err := unix.Mkfifo(f.path, 0o600)
		if err == nil {
			*f.to, err = os.OpenFile(f.path, os.O_RDWR|unix.O_NONBLOCK, 0)
		}
		if err != nil {
			t.close()
			return nil, err
		}
	}
	t.lines = bufio.NewReader(t.out)
	return t, nil
}

func (t *tty) close() {
	for _, f := range []*os.File{t.in, t.out} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// say writes a line and waits for the one that answers it.
func (t *tty) say(line, answer string, until time.Time) error {
	if err := t.out.SetReadDeadline(until); err != nil {
		return err
	}
	if _, err := t.in.WriteString(line + "\n"); err != nil {
		return err
	}
	var said []string
	for {
		got, err := t.lines.ReadString('\n')
		if err != nil {
			return errors.Join(err, fmt.Errorf("it has said %q", said))
		}
		if got = strings.TrimRight(got, "\r\n"); got == answer {
			return nil
		}
		said = append(said, got)
	}
}
