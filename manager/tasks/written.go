package tasks

import (
	"runtime"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
)

// hearing is how long a shim that lived before this daemon may take for its first answer; its records are believed meanwhile.
const hearing = 2 * time.Second

// written is how a task is by what its shim has written down, while that has not been heard since this daemon began: a list
// of hundreds of tasks does not wait until each of them has said what it had said before. A shim that is stopped
// (SIGSTOP) says nothing, so its task is unknown. Nil when the shim must be asked: it is late, another's, or its records do
// not tell, as those of a process that is gone without an exit.
func (s *Service) written(t *Task) *task.StateResponse {
	if t.found == nil || isClosed(t.heard) {
		return nil
	}
	if _, late := t.unresponsive(); late {
		return nil
	}
	l := s.read(t.found)
	d := &l.remains
	if !d.own || l.shim == 0 || !l.made || l.deleted || l.waits {
		return nil
	}
	if s.stopped(t, l.shim) {
		return s.unanswered(t.key.id, "", t.found)
	}
	st := d.state(t.key.id)
	switch {
	case d.exited:
	case !d.alive():
		return nil
	case l.paused:
		st.Status = tasktypes.Status_PAUSED
	case l.started:
		st.Status = tasktypes.Status_RUNNING
	default:
		st.Status = tasktypes.Status_CREATED
	}
	return st
}

// stopped says whether process pid, the shim of a task that has not been heard since this daemon began, is stopped.
func (s *Service) stopped(t *Task, pid uint32) bool {
	if pid == 0 || !t.found.ShimStopped(pid) {
		return false
	}
	t.owes(t.heard, time.Now())
	return true
}

// silent says whether it is known without asking that the shim of a task does not answer.
func (s *Service) silent(t *Task) bool {
	if _, late := t.unresponsive(); late {
		return true
	}
	return t.found != nil && !isClosed(t.heard) && s.stopped(t, s.read(t.found).shim)
}

// unwritten fills in the states of tasks that are known by what is written down, and gives the others, by their place.
func (s *Service) unwritten(all []*Task, states []*task.StateResponse) map[int]*Task {
	places := make(chan int, len(all))
	for i := range all {
		places <- i
	}
	close(places)
	var reading sync.WaitGroup
	for range min(len(all), runtime.GOMAXPROCS(0)) { // each reads files: more at once would only make threads
		reading.Go(func() {
			for i := range places {
				states[i] = s.written(all[i])
			}
		})
	}
	reading.Wait()
	rest := map[int]*Task{}
	for i, t := range all {
		if states[i] == nil {
			rest[i] = t
		}
	}
	return rest
}
