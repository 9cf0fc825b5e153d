package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// waiting is how long anything that is about to happen may take, on a busy machine.
const waiting = 30 * time.Second

// until waits for something that no event tells of.
func (s *stage) until(what string, ok func() (bool, error)) error {
	for deadline := time.Now().Add(waiting); ; {
		done, err := ok()
		if done || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %v for %s", waiting, what)
		}
		select {
		case <-s.ctx.Done():
			return s.ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// pause lets time pass, because its passing is what is shown.
func (s *stage) pause(d time.Duration) error {
	select {
	case <-s.ctx.Done():
		return s.ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// start starts a managerd and shows how.
func (s *stage) start() error {
	s.command("managerd --root " + s.d.Root() + " --state " + s.d.State() + " --address " + s.d.Socket() + " 2>>" + s.d.Log() + " &")
	began := time.Now()
	if err := s.d.Start(); err != nil {
		return err
	}
	s.scr.note("process %d serves containerd's API after %d ms", s.d.PID(), time.Since(began).Milliseconds())
	return nil
}

// kill ends managerd the hard way: it gets no chance to prepare for it. When it returns nobody serves.
func (s *stage) kill() error {
	s.command(fmt.Sprintf("kill -9 %d   # managerd", s.d.PID()))
	if err := s.d.Kill(); err != nil {
		return err
	}
	conn, err := net.Dial("unix", s.d.Socket())
	if err == nil {
		_ = conn.Close()
		return errors.New("the manager was killed, and somebody serves at its socket")
	}
	return nil
}

// command shows a command line, with the directory that everything is in as it was introduced.
func (s *stage) command(line string) {
	s.scr.command(strings.ReplaceAll(line, s.d.Dir, "$D"))
}

// clientCommand is a command line of the client.
func (s *stage) clientCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.client, args...)
	cmd.Dir = s.d.Dir
	cmd.Env = append(os.Environ(), s.environment()...)
	return cmd
}

// environment is how the client knows where to go.
func (s *stage) environment() []string {
	prefix := "MANAGERD"
	if s.foreign() {
		prefix = "CONTAINERD"
	}
	return []string{prefix + "_ADDRESS=" + s.d.Socket(), prefix + "_NAMESPACE=" + s.d.Namespace}
}

// foreign says that the client is containerd's.
func (s *stage) foreign() bool { return s.name == "ctr" }

// result is what a command has printed and how it has ended.
type result struct {
	out, errs string
	status    int
}

// quietly runs a client's command without showing it.
func (s *stage) quietly(args ...string) (result, error) {
	ctx, cancel := context.WithTimeout(s.ctx, waiting)
	defer cancel()
	return finish(s.clientCommand(ctx, args...))
}

// mctl runs a client's command, shows it with what it printed, and fails unless it ends with status 0.
func (s *stage) mctl(args ...string) (string, error) {
	r, err := s.show(args...)
	if err == nil && r.status != 0 {
		err = fmt.Errorf("%s %s ended with status %d: %s", s.name, strings.Join(args, " "), r.status, strings.TrimSpace(r.errs))
	}
	return r.out, err
}

// show is mctl for commands whose status is part of what is shown.
func (s *stage) show(args ...string) (result, error) {
	s.command(s.name + " " + quoted(args))
	r, err := s.quietly(args...)
	s.scr.output(r.out)
	if r.status != 0 {
		s.scr.output(r.errs)
	}
	return r, err
}

// host runs a program of the machine's, and shows it.
func (s *stage) host(args ...string) (string, error) {
	s.command(quoted(args))
	cmd := exec.CommandContext(s.ctx, args[0], args[1:]...)
	cmd.Dir = s.d.Dir
	r, err := finish(cmd)
	s.scr.output(r.out)
	if err == nil && r.status != 0 {
		err = fmt.Errorf("%s: %s", strings.Join(args, " "), strings.TrimSpace(r.errs))
	}
	return r.out, err
}

func finish(cmd *exec.Cmd) (result, error) {
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	r := result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		err = nil
	}
	return r, err
}

// quoted is a command line as one would type it.
func quoted(args []string) string {
	out := make([]string, len(args))
	for i, a := range args {
		out[i] = a
		if a == "" || strings.ContainsAny(a, " \t$;&|<>(){}[]*?!\"'\\#~`") {
			out[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(out, " ")
}

// task is a row of the client's table of tasks.
type task struct{ pid, status string }

// tasks shows the table, and gives it.
func (s *stage) tasks() (map[string]task, error) {
	out, err := s.mctl("tasks", "ls")
	return parseTasks(out), err
}

// parseTasks reads TASK, PID and STATUS; the table may have further columns.
func parseTasks(out string) map[string]task {
	rows := map[string]task{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) >= 3 && f[0] != "TASK" {
			rows[f[0]] = task{f[1], f[2]}
		}
	}
	return rows
}

// log is where a container's output goes.
func (s *stage) log(id string) string { return filepath.Join(s.d.Dir, id+".log") }

// born is when process pid began, in ticks since the boot (field 22 of /proc/PID/stat), empty when it is not there, or
// has ended and waits to be collected: with the pid it names one process and no other.
func born(pid string) string {
	data, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return ""
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return ""
	}
	return f[19]
}
