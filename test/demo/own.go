package main

import (
	"errors"
	"os"
	"strings"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
)

// asking is what the story needs of an image: a shell that counts, and sleeps for parts of a second.
const asking = `i=0; until [ $i = 1 ]; do i=$((i+1)); sleep 0.1; done; readlink /proc/self/ns/pid; exit 42`

// settled is how long a container's own command may take to end by itself, before it counts as one that goes on.
const settled = 2 * time.Second

// own is the demo with somebody's image: what it does by itself, and, if it has a shell, the whole story with it.
func (s *stage) own(archive string) error {
	s.scr.step("Your image", "It is imported from a file; nothing is fetched from anywhere.")
	if err := s.importImage(archive); err != nil {
		return err
	}
	ran, err := s.itself()
	if err != nil {
		return err
	}
	s.scr.step("A shell?", "To count lines, and to exit with 42, an image must have sh, sleep and readlink.")
	r, err := s.show("run", "--rm", s.image, "shell", "sh", "-c", asking)
	if err != nil {
		return err
	}
	if r.status == 42 {
		s.scr.proves("It has: what follows is done with your image.")
		return s.story()
	}
	if !ran {
		return errors.New("this image has neither a command that can be run nor a shell: nothing can be shown with it")
	}
	s.scr.note("It has not. So this cannot be shown with it: that no line of output is lost or doubled, a second program in the " +
		"container (exec), and an exit that is chosen to happen while no manager lives. make demo without IMAGE shows them.")
	return nil
}

// itself runs the image's own command, and kills the manager above it. false: there is none that can be run.
func (s *stage) itself() (bool, error) {
	s.scr.step("Its own command", "The image is run as it was meant to be. Its output goes to a file.")
	const id = "own"
	r, err := s.show("run", "-d", "--log-uri", "file://"+s.log(id), s.image, id)
	if err != nil {
		return false, err
	}
	if r.status != 0 {
		s.scr.note("It cannot be run without arguments.")
		return false, nil
	}
	began := time.Now()
	var status *tasksapi.GetResponse
	if err := s.until("the command", func() (bool, error) {
		status, err = s.get(id)
		return err == nil && status.Process.ExitedAt.AsTime().Unix() > 0 || time.Since(began) > settled, err
	}); err != nil {
		return false, err
	}
	if data, _ := os.ReadFile(s.log(id)); len(data) > 0 {
		if _, err := s.host("tail", "-n", "12", s.log(id)); err != nil {
			return false, err
		}
	}
	rows, err := s.tasks()
	if err != nil {
		return false, err
	}
	c := &running{id, rows[id].pid, born(rows[id].pid)}
	if rows[id].status == "RUNNING" {
		return true, s.goesOn(c)
	}
	return true, s.hasEnded(c, int(status.Process.ExitStatus))
}

// get asks for a task without showing it.
func (s *stage) get(id string) (*tasksapi.GetResponse, error) {
	conn, err := s.d.Conn()
	if err != nil {
		return nil, err
	}
	return tasksapi.NewTasksClient(conn).Get(s.d.Context(s.ctx), &tasksapi.GetRequest{ContainerID: id})
}

// goesOn kills the manager above a command that runs.
func (s *stage) goesOn(c *running) error {
	s.scr.proves("It runs, as process %s of this machine.", c.pid)
	s.scr.step("The manager dies", "kill -9: it cannot save, hand over or say goodbye. Then another one is started.")
	if err := s.kill(); err != nil {
		return err
	}
	if err := s.pause(time.Second); err != nil {
		return err
	}
	if err := c.still(); err != nil {
		return err
	}
	s.scr.proves("A second later there is no manager, and process %s runs.", c.pid)
	if err := s.start(); err != nil {
		return err
	}
	if err := s.same(c); err != nil {
		return err
	}
	s.scr.proves("The same task, running, with the same pid %s: found again, not started again.", c.pid)
	if err := s.metrics(c); err != nil {
		return err
	}
	return s.remove(c)
}

// hasEnded shows that how a command ended is known to a manager that did not see it.
func (s *stage) hasEnded(c *running, code int) error {
	s.scr.proves("It has ended by itself, with status %d.", code)
	s.scr.step("The manager dies", "kill -9: it cannot save, hand over or say goodbye. Then another one is started, and asked how the command ended.")
	if err := s.kill(); err != nil {
		return err
	}
	if err := s.start(); err != nil {
		return err
	}
	rows, err := s.tasks()
	if err != nil {
		return err
	}
	if got := rows[c.id]; got.pid != c.pid || !strings.EqualFold(got.status, "STOPPED") {
		return errors.New("task " + c.id + " is not the one it was: " + got.pid + " " + got.status)
	}
	if err := s.code(c.id, code); err != nil {
		return err
	}
	s.scr.proves("Status %d, from a manager that was not there when it happened.", code)
	return nil
}
