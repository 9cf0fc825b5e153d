package shimapi

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// The lifecycle, written down a second time by hand: one line a request, one column a state in the order of States.
// n: NotFound, a: AlreadyExists, '.': FailedPrecondition, '=': allowed and the state stays, a letter: the state that follows.
var byHand = map[Kind]string{
	Init: `
		create     C a a a a a a a
		start      n R . . . . . n
		exec       n = = . . . . n
		state      n = = = = = = n
		kill       n = = = = = n n
		wait       n = = = = = = n
		pids       n = = = = = . n
		pause      n . P . . . . n
		resume     n . . . R . . n
		stats      n = = = = = . n
		update     n = = . = . . n
		resize-pty n = = = = = . n
		close-io   n = = = = = = n
		checkpoint n . = . = . . n
		delete     n D . . . . D n
		exited     n S S S S S . n`,
	Exec: `
		create     C a a a a a a a
		start      n R . . . . . n
		exec       n . . . . . . n
		state      n = = . . . = n
		kill       n = = . . . n n
		wait       n = = . . . = n
		pids       n . . . . . . n
		pause      n . . . . . . n
		resume     n . . . . . . n
		stats      n . . . . . . n
		update     n . . . . . . n
		resize-pty n = = . . . . n
		close-io   n = = . . . = n
		checkpoint n . . . . . . n
		delete     n D . . . . D n
		exited     n S S . . . . n`,
}

var letters = map[string]State{"C": Created, "R": Running, "P": Paused, "S": Stopped, "D": Deleted}

// TestLifecycle asks for every request in every state.
func TestLifecycle(t *testing.T) {
	for kind, table := range byHand {
		seen := map[Request]bool{}
		for _, line := range strings.Split(strings.TrimSpace(table), "\n") {
			cells := strings.Fields(line)
			req := Request(cells[0])
			seen[req] = true
			if len(cells) != len(States)+1 {
				t.Fatalf("%s %s: %d cells", kind, req, len(cells))
			}
			for i, want := range cells[1:] {
				judge(t, kind, States[i], req, want)
			}
		}
		for _, req := range Requests {
			if !seen[req] {
				t.Errorf("%s of %s is not in the table", req, kind)
			}
		}
		if len(seen) != len(Requests) {
			t.Errorf("%s: %d requests, known are %d", kind, len(seen), len(Requests))
		}
	}
}

func judge(t *testing.T, kind Kind, from State, req Request, want string) {
	t.Helper()
	step, ok := Next(kind, from, req)
	err := Check(kind, "x1", from, req)
	illegal := map[string]func(error) bool{"n": errdefs.IsNotFound, "a": errdefs.IsAlreadyExists, ".": errdefs.IsFailedPrecondition}
	if is := illegal[want]; is != nil {
		if ok || !is(err) || !strings.Contains(err.Error(), "x1") {
			t.Errorf("%s of %s in %s: allowed %v, error %v", req, kind, from, ok, err)
		}
		if !panics(func() { MustNext(kind, from, req) }) {
			t.Errorf("an internal %s of %s in %s does not panic", req, kind, from)
		}
		return
	}
	to := letters[want]
	if want == "=" {
		to = from
	}
	if !ok || err != nil || step.To != to || MustNext(kind, from, req) != to {
		t.Errorf("%s of %s in %s: %+v, %v, want %s", req, kind, from, step, err, to)
	}
	if step.Kind != kind || step.From != from || step.Request != req {
		t.Errorf("%s of %s in %s is the step %+v", req, kind, from, step)
	}
	if via := map[Request]State{ReqPause: Pausing, ReqCheckpoint: Checkpointing}[req]; step.Via != via {
		t.Errorf("%s of %s in %s passes through %q, want %q", req, kind, from, step.Via, via)
	}
}

func panics(fn func()) (did bool) {
	defer func() { did = recover() != nil }()
	fn()
	return false
}

// TestReached: a state that a step leads to or through is one in which the end of the process is known: nothing is stuck.
func TestReached(t *testing.T) {
	for _, step := range transitions {
		for _, s := range []State{step.To, step.Via} {
			if s == "" || s == Stopped || s == Deleted {
				continue
			}
			if next, ok := Next(step.Kind, s, Exited); !ok || next.To != Stopped {
				t.Errorf("%+v leads to %s, which no exit ends", step, s)
			}
		}
	}
}

// TestIllegal: the sentence says what is wrong and what would do.
func TestIllegal(t *testing.T) {
	for _, c := range []struct {
		kind Kind
		from State
		req  Request
		want string
	}{
		{Init, Stopped, ReqPause, "cannot pause container x1: it is stopped, must be running: failed precondition"},
		{Init, Running, ReqDelete, "cannot delete container x1: it is running, must be created or stopped: failed precondition"},
		{Exec, Running, ReqPause, "cannot pause exec x1: it is running, must be in no state at all: failed precondition"},
		{Exec, Absent, ReqStart, "exec x1: not found"},
		{Init, Stopped, ReqKill, "container x1 has ended: process already finished: not found"},
		{Init, Paused, ReqCreate, "container x1 is there already, in state paused: already exists"},
	} {
		if err := Check(c.kind, "x1", c.from, c.req); err == nil || err.Error() != c.want {
			t.Errorf("%s of %s in %s: %v", c.req, c.kind, c.from, err)
		}
	}
}
