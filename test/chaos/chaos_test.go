package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/managerd/managerd/test/harness"
)

// finishing is how long all may take to come to its end when no more faults are made.
const finishing = 2 * time.Minute

// TestChaos: whatever is killed, stopped and replaced, and however often, every exit status is right or said to be unknown
// where nobody was left to see it, every line is there once and in order, no container ends that was not told to, and
// nothing is left.
func TestChaos(t *testing.T) {
	s := *seed
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("-chaos.seed=%d -chaos.duration=%s", s, *duration)
	d, err := harness.New(bin)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			dir, err := keep(d)
			t.Logf("what is known is kept in %s (%v); seed %d", dir, err, s)
			if err := d.Raze(); err != nil {
				t.Error(err)
			}
			return
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	if out, err := harness.Output(d.Mctl("images", "import", archive)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	j, err := newJournal(d)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = j.file.Close() }()
	if err := storm(t, d, j, s); err != nil {
		t.Error(err)
	}
	for _, f := range j.figures() {
		t.Log(f)
	}
}

// storm is the test, on a daemon that serves.
func storm(t *testing.T, d *harness.Daemon, j *journal, seed uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), *duration+finishing)
	defer cancel()
	c, err := dial(ctx, d)
	if err != nil {
		return err
	}
	defer func() { _ = c.conn.Close() }()
	dir := filepath.Join(d.Dir, "sinks")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	random := func(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }
	m := &monkey{d: d, j: j, r: random(0)}
	host := &load{client: c, j: j, sinks: dir, r: random(1)}
	var all []*ticker
	for i := range *tickers {
		tk, err := host.tick(i)
		if err != nil {
			return err
		}
		desc, err := m.describe(tk.id)
		if err != nil {
			return err
		}
		tk.fds = desc.Fds
		all = append(all, tk)
	}
	fds := descriptors(d.PID())

	stop := make(chan struct{})
	failed := make(chan error, *workers+*tickers+1)
	var loads []*load
	busy := newGroup()
	begin := func(stream uint64, step func(l *load, n int) error) {
		l := &load{client: c, j: j, sinks: dir, r: random(stream)}
		loads = append(loads, l)
		busy.run(stop, failed, func(n int) error { return step(l, n) })
	}
	for w := range *workers {
		begin(uint64(100+w), func(l *load, n int) error { return l.live(fmt.Sprintf("w%d-%d", w, n)) })
	}
	for i, tk := range all {
		begin(uint64(1000+i), func(l *load, n int) error {
			_, err := l.runExec(tk.id, fmt.Sprintf("e%d", n), "")
			return err
		})
	}
	busy.run(stop, failed, func(int) error { return probe(c, j) })

	err = nil
	for until := time.Now().Add(*duration); err == nil && time.Now().Before(until); {
		select {
		case err = <-failed:
		case <-time.After(time.Duration(m.r.IntN(1+m.r.IntN(400))) * time.Millisecond): // short ones are more frequent
			err = m.fault()
		}
	}
	m.under.Wait()
	err = errors.Join(err, m.ready(time.Now()))
	j.note("no more faults: %v", err)
	close(stop)
	if err != nil {
		return err
	}
	if err := busy.wait(finishing / 2); err != nil {
		return err
	}
	close(failed)
	for err := range failed {
		return err
	}
	sum := load{}
	for _, l := range loads {
		sum.lives, sum.execs, sum.lines, sum.cuts = sum.lives+l.lives, sum.execs+l.execs, sum.lines+l.lines, sum.cuts+l.cuts
	}
	t.Logf("%d containers lived and died, %d execs, %d lines of theirs; %d starts were cut off and asked for again", sum.lives, sum.execs, sum.lines, sum.cuts)
	if sum.lives < int(*duration/(5*time.Second)) || sum.execs < int(*duration/(5*time.Second)) {
		return errors.New("next to nothing happened while things were killed")
	}
	if now := descriptors(d.PID()); now > fds+10 {
		t.Errorf("managerd has %d descriptors open, at the beginning %d", now, fds)
	}
	for _, tk := range all {
		if err := host.stop(t, m, tk); err != nil {
			t.Error(err)
		}
	}
	if t.Failed() {
		return nil
	}
	return c.empty()
}

// stop ends a ticker while no shim of it lives, and looks at all that it wrote.
func (l *load) stop(t *testing.T, m *monkey, tk *ticker) error {
	resp, err := l.tasks.Get(l.ctx, &tasksapi.GetRequest{ContainerID: tk.id})
	if err != nil || resp.Process.Pid != tk.pid || resp.Process.Status != tasktypes.Status_RUNNING {
		return fmt.Errorf("%s was process %d, and is %v: %v", tk.id, tk.pid, resp.GetProcess(), err)
	}
	desc, err := m.describe(tk.id)
	if err != nil {
		return err
	}
	if desc.Fds > tk.fds+4 {
		t.Errorf("the shim of %s has %d descriptors open, at the beginning %d", tk.id, desc.Fds, tk.fds)
	}
	begin := time.Now()
	for _, v := range m.victims(func(id string) bool { return id == tk.id }) {
		l.j.note("shim killed, and its container ended: %s, pid %d", v.id, v.pid)
		_ = v.signal(unix.SIGKILL)
		v.close()
	}
	if err := unix.Kill(int(tk.pid), unix.SIGTERM); err != nil {
		return fmt.Errorf("%s: %w", tk.id, err)
	}
	got, err := l.wait(tk.id, "")
	if err != nil {
		return err
	}
	if _, err := l.judge(tk.id, "", got, tk.code, begin, 0); err != nil {
		return err
	}
	lines, err := tk.finish(time.Minute)
	if err != nil {
		return err
	}
	t.Logf("%s (%s): %d lines, each once and in order; ended with %d while no shim lived", tk.id, tk.scheme, lines, got)
	return l.remove(tk.id, got)
}

// probe lists the tasks, which no fault but the daemon's death may delay.
func probe(c *client, j *journal) error {
	begin := time.Now()
	ctx, cancel := context.WithTimeout(c.ctx, 30*time.Second)
	defer cancel()
	_, err := c.tasks.List(ctx, &tasksapi.ListTasksRequest{}, grpc.WaitForReady(false))
	switch {
	case err == nil:
		j.sample("list of tasks", time.Since(begin))
	case ctx.Err() != nil && c.ctx.Err() == nil:
		return fmt.Errorf("a list of tasks has no answer: %w", err)
	}
	select {
	case <-time.After(100 * time.Millisecond):
	case <-c.ctx.Done():
	}
	return nil
}

// empty says what is left of containers, tasks and snapshots.
func (c *client) empty() error {
	tasks, err := c.tasks.List(c.ctx, &tasksapi.ListTasksRequest{})
	if err != nil {
		return err
	}
	if len(tasks.Tasks) > 0 {
		return fmt.Errorf("tasks are left: %v", tasks.Tasks)
	}
	list, err := c.containers.List(c.ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	if len(list.Containers) > 0 {
		return fmt.Errorf("containers are left: %v", list.Containers)
	}
	var left []string
	err = c.eachSnapshot(func(i *snapshotsapi.Info) {
		if i.Kind != snapshotsapi.Kind_COMMITTED {
			left = append(left, i.Name)
		}
	})
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("snapshots are left: %q", left)
	}
	return err
}
