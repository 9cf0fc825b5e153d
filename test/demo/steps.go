package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/managerd/managerd/test/image"
)

// The programs that the containers run. Each tenth of a second is a line: what is lost or doubled is seen.
const (
	counting = `i=0; while :; do i=$((i+1)); echo "line $i"; sleep 0.1; done`
	ending   = `until [ -e /go ]; do sleep 0.1; done; exit 42`
)

// begin starts the first manager.
func (s *stage) begin() error {
	s.scr.step("A manager of our own", "managerd with its defaults: no configuration file, no network, nothing installed. "+
		"Everything it keeps is below two directories.")
	s.scr.command("D=" + s.d.Dir + "; cd $D")
	if err := s.start(); err != nil {
		return err
	}
	s.command("export " + strings.Join(s.environment(), " "))
	out, err := s.mctl("version")
	if err != nil {
		return err
	}
	if !strings.Contains(strings.ToLower(out), "version") {
		return fmt.Errorf("%s version says %q", s.name, out)
	}
	s.scr.proves("A client talks to it.")
	return nil
}

// busybox is the demo with an image that it makes itself.
func (s *stage) busybox(archive string) error {
	if err := image.Write(archive, image.Options{}); err != nil {
		return err
	}
	s.scr.step("An image", "An OCI image, made a moment ago of this machine's /bin/busybox. docker save writes such files too: "+
		"make demo IMAGE=file.tar")
	if err := s.importImage(archive); err != nil {
		return err
	}
	return s.story()
}

// importImage imports an archive and takes the first image in it.
func (s *stage) importImage(archive string) error {
	if _, err := s.mctl("images", "import", shorter(s.d.Dir, archive)); err != nil {
		return err
	}
	out, err := s.mctl("images", "ls", "-q")
	if err != nil {
		return err
	}
	names := strings.Fields(out)
	if len(names) == 0 {
		return fmt.Errorf("%s holds no image that can be named", archive)
	}
	s.image = names[0]
	s.scr.proves("Every blob is in the store, verified by its digest, and the layers are unpacked: %s", s.image)
	if len(names) > 1 {
		s.scr.note("of its %d images this one is taken", len(names))
	}
	return nil
}

// shorter is path as seen from dir, when it is below.
func shorter(dir, path string) string {
	if rel, err := filepath.Rel(dir, path); err == nil && filepath.IsLocal(rel) {
		return rel
	}
	return path
}

// running is a container that was seen to run.
type running struct{ id, pid, born string }

// launch runs a detached container and shows that it runs.
func (s *stage) launch(id string, args ...string) (*running, error) {
	run := append([]string{"run", "-d", "--log-uri", "file://" + s.log(id), s.image, id}, args...)
	if _, err := s.mctl(run...); err != nil {
		return nil, err
	}
	rows, err := s.tasks()
	if err != nil {
		return nil, err
	}
	t, ok := rows[id]
	if !ok {
		return nil, fmt.Errorf("task %s is not in the table", id)
	}
	return &running{id, t.pid, born(t.pid)}, nil
}

// still fails unless c is the process it was.
func (c *running) still() error {
	if now := born(c.pid); now == "" || now != c.born {
		return fmt.Errorf("process %s of container %s is gone", c.pid, c.id)
	}
	return nil
}

// same fails unless the table says that c runs with the pid it had, and the pid is still that process.
func (s *stage) same(c *running) error {
	rows, err := s.tasks()
	if err != nil {
		return err
	}
	if t := rows[c.id]; t.pid != c.pid || t.status != "RUNNING" {
		return fmt.Errorf("task %s has pid %q and status %q, not %s and RUNNING", c.id, t.pid, t.status, c.pid)
	}
	return c.still()
}

// story is the whole demo, for an image with a shell.
func (s *stage) story() error {
	s.scr.step("A container that counts", "It writes ten numbered lines a second, into a file. What stands between it and the file is its "+
		"shim, a small process of its own, and not the manager.")
	counter, err := s.launch("counter", "sh", "-c", counting)
	if err != nil {
		return err
	}
	if err := s.lines(3); err != nil {
		return err
	}
	if _, err := s.tail(); err != nil {
		return err
	}
	if err := counter.still(); err != nil {
		return err
	}
	s.scr.proves("The container runs as process %s of this machine.", counter.pid)

	if err := s.away(counter); err != nil {
		return err
	}
	if err := s.reached(counter); err != nil {
		return err
	}
	if err := s.exit42(counter); err != nil {
		return err
	}
	return s.reckon(counter)
}

// away kills the manager and shows that nothing else noticed.
func (s *stage) away(c *running) error {
	s.scr.step("The manager dies", "kill -9: it cannot save, hand over or say goodbye. For a while no manager exists at all.")
	if err := s.kill(); err != nil {
		return err
	}
	before, err := s.tail()
	if err != nil {
		return err
	}
	if err := s.pause(time.Second); err != nil {
		return err
	}
	s.scr.note("a second later")
	if err := s.lines(before + 2); err != nil {
		return err
	}
	after, err := s.tail()
	if err != nil {
		return err
	}
	if err := c.still(); err != nil {
		return err
	}
	s.scr.proves("No manager, and the container went from line %d to line %d: it needs none to run, nor to be heard.", before, after)

	s.scr.step("Another manager", "It is started like the first one and knows nothing but the two directories.")
	if err := s.start(); err != nil {
		return err
	}
	if err := s.same(c); err != nil {
		return err
	}
	if err := s.inOrder(); err != nil {
		return err
	}
	s.scr.proves("The same task, running, with the same pid %s: found again, not started again.", c.pid)
	s.scr.proves("Not one line is missing or doubled.")
	return nil
}

// reached shows that the new manager can do with the container what the old one could.
func (s *stage) reached(c *running) error {
	s.scr.step("As if nothing had happened", "A second program is started in the container, and its resources are measured, through a manager "+
		"that did not make it.")
	if err := s.inside(c); err != nil {
		return err
	}
	return s.metrics(c)
}

// inside starts a program in a container and shows that it ran there: both are in the same pid namespace.
func (s *stage) inside(c *running) error {
	const namespace = "/ns/pid"
	inner, err := s.mctl("tasks", "exec", "--exec-id", "look", c.id, "readlink", "/proc/self"+namespace)
	if err != nil {
		return err
	}
	outer, err := s.host("readlink", "/proc/"+c.pid+namespace)
	if err != nil {
		return err
	}
	if strings.TrimSpace(inner) != strings.TrimSpace(outer) || inner == "" {
		return fmt.Errorf("the program ran in %q, the container is %q", inner, outer)
	}
	s.scr.proves("The program ran inside: it shares its pid namespace with the container's own process.")
	return nil
}

// metrics shows what a container uses.
func (s *stage) metrics(c *running) error {
	out, err := s.mctl("tasks", "metrics", c.id)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "memory") || !strings.ContainsAny(out, "123456789") {
		return fmt.Errorf("metrics are %q", out)
	}
	s.scr.proves("Its memory and CPU time are counted.")
	return nil
}

// exit42 lets a container end while there is no manager, and asks for its status afterwards.
func (s *stage) exit42(counter *running) error {
	s.scr.step("An exit that no manager saw", "A container waits for a file to appear and then exits with 42. It will appear while the manager is dead.")
	job, err := s.launch("job", "sh", "-c", ending)
	if err != nil {
		return err
	}
	if err := job.still(); err != nil {
		return err
	}
	if err := s.kill(); err != nil {
		return err
	}
	if _, err := s.host("touch", "/proc/"+job.pid+"/root/go"); err != nil {
		return err
	}
	if err := s.until("the container to end", func() (bool, error) { return job.still() != nil, nil }); err != nil {
		return err
	}
	s.scr.note("process %s has ended, and no manager was there to see it", job.pid)
	if err := s.start(); err != nil {
		return err
	}
	rows, err := s.tasks()
	if err != nil {
		return err
	}
	if got := rows[job.id].status; got != "STOPPED" {
		return fmt.Errorf("task %s is %q, not STOPPED", job.id, got)
	}
	if err := s.code(job.id, 42); err != nil {
		return err
	}
	s.scr.proves("42: its shim had written the exit status down before anyone asked.")
	return counter.still()
}

// code asks the client for the exit status of an ended task.
func (s *stage) code(id string, want int) error {
	args := []string{"tasks", "wait", id}
	if s.foreign() { // it has no such command, and warns of a status that is not 0 when it removes a task
		args = []string{"tasks", "rm", id}
	}
	r, err := s.show(args...)
	if err != nil {
		return err
	}
	number := strconv.Itoa(want)
	switch {
	case s.foreign():
		s.scr.output(r.errs)
		if want != 0 && !strings.Contains(r.errs, number) {
			return fmt.Errorf("%s says %q, and not %d", quoted(args), r.errs, want)
		}
		return nil
	case r.status != 0:
		s.scr.command("echo $?")
		s.scr.output(strconv.Itoa(r.status))
	}
	if r.status != want && strings.TrimSpace(r.out) != number {
		return fmt.Errorf("%s ended with %d and says %q, not %d", quoted(args), r.status, r.out, want)
	}
	return nil
}

// reckon removes the containers and counts the lines.
func (s *stage) reckon(c *running) error {
	s.scr.step("The reckoning", "Two managers were killed while this container ran. It is ended now, and its lines are counted.")
	if err := s.remove(c); err != nil {
		return err
	}
	if _, err := s.tail(); err != nil {
		return err
	}
	if err := s.inOrder(); err != nil {
		return err
	}
	n, err := s.count()
	if err != nil {
		return err
	}
	s.scr.proves("Lines 1 to %d, each of them once, in order.", n)
	return nil
}

// remove ends a running container and removes it.
func (s *stage) remove(c *running) error {
	if _, err := s.mctl("tasks", "kill", "-s", "SIGKILL", c.id); err != nil {
		return err
	}
	if err := s.until("the task to be shown as stopped", func() (bool, error) {
		r, err := s.quietly("tasks", "ls")
		return parseTasks(r.out)[c.id].status == "STOPPED", err
	}); err != nil {
		return err
	}
	if _, err := s.show("tasks", "rm", c.id); err != nil { // its status is that of the task: 137
		return err
	}
	r, err := s.quietly("tasks", "ls")
	if err != nil {
		return err
	}
	if t, ok := parseTasks(r.out)[c.id]; ok {
		return fmt.Errorf("task %s was removed, and is %s", c.id, t.status)
	}
	if _, err := s.mctl("containers", "rm", c.id); err != nil {
		return err
	}
	return nil
}

// numbers reads the counter's log: the numbers of its lines, of which the last may be half written.
func (s *stage) numbers() ([]int, error) {
	data, err := os.ReadFile(s.log("counter"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []int
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, "\n") {
			break
		}
		n, err := strconv.Atoi(strings.TrimPrefix(strings.TrimSpace(line), "line "))
		if err != nil {
			return nil, fmt.Errorf("the container wrote %q, which is no numbered line", line)
		}
		out = append(out, n)
	}
	return out, nil
}

func (s *stage) count() (int, error) {
	got, err := s.numbers()
	return len(got), err
}

// inOrder fails unless every line from the first on is there once.
func (s *stage) inOrder() error {
	got, err := s.numbers()
	if err != nil {
		return err
	}
	for i, n := range got {
		if n != i+1 {
			return fmt.Errorf("line %d of the log says %d", i+1, n)
		}
	}
	return nil
}

// lines waits until the counter has written at least n.
func (s *stage) lines(n int) error {
	return s.until(fmt.Sprintf("line %d", n), func() (bool, error) {
		got, err := s.count()
		return got >= n, err
	})
}

// tail shows the last lines, and gives the number of the last.
func (s *stage) tail() (int, error) {
	out, err := s.host("tail", "-n", "2", filepath.Base(s.log("counter")))
	if err != nil {
		return 0, err
	}
	last := out[strings.LastIndex(strings.TrimSpace(out), " ")+1:]
	n, err := strconv.Atoi(strings.TrimSpace(last))
	if err != nil {
		return 0, fmt.Errorf("the container's last line is %q", out)
	}
	return n, nil
}
