package tasks

import (
	"context"
	"fmt"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/shims"
)

// Task is one task, from the moment it is being made or was found until it is deleted.
type Task struct {
	key      key
	settled  chan struct{} // closed once there is a shim, or remains, or nothing because it could not be made
	followed chan struct{} // closed once no more events of this task come

	// adopt finds out what there is of a task that lived before this daemon; nil for one that this daemon made. It runs
	// once: when its turn comes, or when somebody asks for the task.
	adopt func()
	begin sync.Once
	found *bundle.Bundle // with adopt
	heard chan struct{}  // with adopt: closed once its shim has answered, or is known not to

	mu       sync.Mutex
	shim     *shims.Shim
	dead     *remains
	changed  chan struct{} // closed, and replaced, when shim or dead changes
	once     sync.Once     // closes settled
	ending   bool          // the shim was told to shut down: its end is no accident
	deletion *deletion     // under way; nil for none
	waits    map[string]*wait
	overdue  <-chan struct{} // closed when the shim answers what it has not answered in time; nil: it does not owe any
	silent   time.Time       // when what is overdue was asked
	doomed   bool            // it is removed as soon as its process has ended
}

// deletion is a Delete under way: whoever else asks for it waits for its end.
type deletion struct {
	done chan struct{}
	resp *task.DeleteResponse
	err  error
}

// wait is one request to the shim, for all who wait for the same process.
type wait struct {
	done chan struct{}
	once sync.Once
	resp *task.WaitResponse
	err  error
}

func (w *wait) answer(resp *task.WaitResponse, err error) {
	w.once.Do(func() {
		w.resp, w.err = resp, err
		close(w.done)
	})
}

func newTask(k key) *Task {
	return &Task{
		key: k, settled: make(chan struct{}), followed: make(chan struct{}), changed: make(chan struct{}), waits: map[string]*wait{},
	}
}

// settle says what there is of the task. Later calls change it: the shim of a living task may die.
func (t *Task) settle(shim *shims.Shim, dead *remains) {
	t.mu.Lock()
	t.shim, t.dead = shim, dead
	close(t.changed)
	t.changed = make(chan struct{})
	t.mu.Unlock()
	t.once.Do(func() { close(t.settled) })
}

// now is what there is of the task: a shim, or remains, or neither once it is gone. changed is closed when that is no
// longer so.
func (t *Task) now() (shim *shims.Shim, dead *remains, changed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.shim, t.dead, t.changed
}

func (t *Task) expectEnd(expected bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ending = expected
}

func (t *Task) endExpected() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ending
}

// lost says, of a call that failed as unavailable, whether the connection was lost; what follows the shim then finds out
// whether the shim is.
func lost(shim *shims.Shim, err error) bool {
	if !errdefs.IsUnavailable(err) {
		return false
	}
	select {
	case <-shim.Gone():
		return true
	case <-time.After(time.Second): // the call may have learned it a moment before
		return false
	}
}

// ask calls a shim that may be wedged: the caller waits as long as ctx, and of what a shim has not answered in time only
// one request is outstanding, so that asking again and again does not fill its socket.
func ask[T any](ctx context.Context, s *Service, t *Task, shim *shims.Shim, call func(context.Context, *shims.Shim) (T, error)) (T, error) {
	var none T
	t.mu.Lock()
	overdue := t.overdue
	t.mu.Unlock()
	if overdue != nil {
		select {
		case <-overdue:
		case <-shim.Gone():
		case <-ctx.Done():
			return none, fmt.Errorf("shim of task %s does not answer: %w", t.key.id, ctx.Err())
		}
	}
	type answer struct {
		v   T
		err error
	}
	answered, done, asked := make(chan answer, 1), make(chan struct{}), time.Now()
	// It outlives the caller; s.ctx ends it with the service.
	err := s.background(func() {
		defer close(done)
		v, err := call(s.in(t.key.ns), shim)
		answered <- answer{v, err}
	})
	if err != nil {
		return none, err
	}
	select {
	case a := <-answered:
		return a.v, a.err
	case <-ctx.Done():
	}
	t.owes(done, asked)
	return none, fmt.Errorf("shim of task %s does not answer: %w", t.key.id, ctx.Err())
}

// owes notes that the shim has not answered what it was asked; another request that it owes an answer to came first.
func (t *Task) owes(answered <-chan struct{}, asked time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.overdue == nil || isClosed(t.overdue) {
		t.overdue, t.silent = answered, asked
	}
}

// unresponsive says since when the shim owes an answer; false: it owes none.
func (t *Task) unresponsive() (since time.Time, is bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.silent, t.overdue != nil && !isClosed(t.overdue) && (t.shim == nil || !isClosed(t.shim.Gone()))
}

// Unresponsive says which shims of the namespace have not answered a request in time, by the ids of their tasks, and when
// that request was sent. It asks nobody.
func (s *Service) Unresponsive(ctx context.Context) (map[string]time.Time, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]time.Time{}
	for k, t := range s.tasks {
		if since, is := t.unresponsive(); is && k.ns == ns {
			out[k.id] = since
		}
	}
	return out, nil
}

// remains is what is known of a task whose shim is dead.
type remains struct {
	bundle   *bundle.Bundle
	own      bool // the shim was ours: all that it knew is here
	joined   bool // it was an endpoint
	told     bool // that it is gone, or it was never made: nobody hears of it again
	pid      uint32
	ticks    uint64 // when pid began
	exited   bool   // and this is how:
	status   uint32
	exitedAt time.Time
	terminal bool
	stdio    [3]string
}

// alive says whether the init runs on without its shim.
func (d *remains) alive() bool { return !d.exited && d.pid != 0 && bundle.InitAlive(d.pid, d.ticks) }
