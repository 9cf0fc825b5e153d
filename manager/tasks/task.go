package tasks

import (
	"sync"
	"time"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/shims"
)

// Task is one task, from the moment it is being made or was found until it is deleted.
type Task struct {
	key      key
	settled  chan struct{} // closed once there is a shim, or remains, or nothing because it could not be made
	followed chan struct{} // closed once no more events of this task come
	deleting sync.Mutex

	mu     sync.Mutex
	shim   *shims.Shim
	dead   *remains
	ending bool // the shim was told to shut down: its end is no accident
	once   sync.Once
}

// remains is what is known of a task whose shim is dead.
type remains struct {
	bundle   *bundle.Bundle
	pid      uint32
	exited   bool // and this is how:
	status   uint32
	exitedAt time.Time
	terminal bool
	stdio    [3]string
}

func newTask(k key) *Task {
	return &Task{key: k, settled: make(chan struct{}), followed: make(chan struct{})}
}

// settle says what there is of the task. Later calls change it: the shim of a living task may die.
func (t *Task) settle(shim *shims.Shim, dead *remains) {
	t.mu.Lock()
	t.shim, t.dead = shim, dead
	t.mu.Unlock()
	t.once.Do(func() { close(t.settled) })
}

func (t *Task) connection() *shims.Shim {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.shim
}

func (t *Task) remains() *remains {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dead
}

func (t *Task) expectEnd() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ending = true
}

func (t *Task) endExpected() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ending
}
