package tasks

import (
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
	if t.found.ShimStopped(l.shim) {
		t.owes(t.heard, time.Now())
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
