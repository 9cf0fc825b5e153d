package shimapi

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// State is where a process (a container's init, or an exec) stands in its life.
type State string

// The states. Absent is a process that nobody made yet, Deleted one whose record is gone: both answer "not found".
// Pausing and Checkpointing are held only while that request runs.
const (
	Absent        State = "absent"
	Created       State = "created"
	Running       State = "running"
	Pausing       State = "pausing"
	Paused        State = "paused"
	Checkpointing State = "checkpointing"
	Stopped       State = "stopped"
	Deleted       State = "deleted"
)

// Request is what a client may ask of a process, or (Exited) what the kernel reports of it.
type Request string

// The requests of the task API, and the one event that nobody asks for.
const (
	ReqCreate     Request = "create"
	ReqStart      Request = "start"
	ReqExec       Request = "exec" // add an exec to a container: judged by the state of its init
	ReqState      Request = "state"
	ReqKill       Request = "kill"
	ReqWait       Request = "wait"
	ReqPids       Request = "pids"
	ReqPause      Request = "pause"
	ReqResume     Request = "resume"
	ReqStats      Request = "stats"
	ReqUpdate     Request = "update"
	ReqResizePty  Request = "resize-pty"
	ReqCloseIO    Request = "close-io"
	ReqCheckpoint Request = "checkpoint"
	ReqDelete     Request = "delete"
	Exited        Request = "exited"
)

// Kind says which of a container's processes a table row speaks of.
type Kind string

// The two kinds of process.
const (
	Init Kind = "init"
	Exec Kind = "exec"
)

// States and Requests list every one, in the order in which a life goes through them.
var (
	States   = []State{Absent, Created, Running, Pausing, Paused, Checkpointing, Stopped, Deleted}
	Requests = []Request{
		ReqCreate, ReqStart, ReqExec, ReqState, ReqKill, ReqWait, ReqPids, ReqPause, ReqResume, ReqStats, ReqUpdate,
		ReqResizePty, ReqCloseIO, ReqCheckpoint, ReqDelete, Exited,
	}
)

// Transition is one allowed cell of the table: a request, in a state, and the state that follows when it succeeds.
// Via is the state held while the request runs, if it is another one.
type Transition struct {
	Kind    Kind
	From    State
	Request Request
	Via     State
	To      State
}

// transitions is the whole lifecycle: what is not in it is illegal.
var transitions = build()

type key struct {
	kind Kind
	from State
	req  Request
}

func build() map[key]Transition {
	t := map[key]Transition{}
	add := func(k Kind, req Request, to State, from ...State) {
		for _, f := range from {
			next := to
			if next == "" {
				next = f // the request leaves the state as it is
			}
			t[key{k, f, req}] = Transition{Kind: k, From: f, Request: req, To: next}
		}
	}
	via := func(k Kind, req Request, from, through, to State) {
		t[key{k, from, req}] = Transition{Kind: k, From: from, Request: req, Via: through, To: to}
	}
	const same State = ""
	live := []State{Created, Running, Pausing, Paused, Checkpointing}
	known := append(append([]State{}, live...), Stopped)

	for _, k := range []Kind{Init, Exec} {
		add(k, ReqCreate, Created, Absent)
		add(k, ReqStart, Running, Created)
		add(k, ReqState, same, known...)
		add(k, ReqWait, same, known...)
		add(k, ReqKill, same, live...) // its effect shows as Exited
		add(k, ReqResizePty, same, live...)
		add(k, ReqCloseIO, same, known...)
		add(k, ReqDelete, Deleted, Stopped)
		add(k, Exited, Stopped, live...)
	}
	// A created container is a parked init: deleting it ends that first. A created exec has no process yet.
	add(Init, ReqDelete, Deleted, Created)
	add(Exec, ReqDelete, Deleted, Created)
	add(Init, ReqExec, same, Created, Running)
	add(Init, ReqPids, same, live...)
	add(Init, ReqStats, same, live...)
	add(Init, ReqUpdate, same, Created, Running, Paused)
	via(Init, ReqPause, Running, Pausing, Paused)
	add(Init, ReqResume, Running, Paused)
	via(Init, ReqCheckpoint, Running, Checkpointing, Running)
	via(Init, ReqCheckpoint, Paused, Checkpointing, Paused)

	// An exec knows no pause of its own: it stands still with its container.
	for _, s := range []State{Pausing, Paused, Checkpointing} {
		for _, r := range Requests {
			delete(t, key{Exec, s, r})
		}
	}
	return t
}

// Next looks a request up. ok is false when it is illegal in that state.
func Next(k Kind, from State, req Request) (t Transition, ok bool) {
	t, ok = transitions[key{k, from, req}]
	return t, ok
}

// Check says whether a request is legal; the error is NotFound for a process that is not there, AlreadyExists for
// making one twice, FailedPrecondition otherwise, and names the object, its state and the states that would do.
func Check(k Kind, name string, from State, req Request) error {
	if _, ok := Next(k, from, req); ok {
		return nil
	}
	switch {
	case req == ReqCreate:
		return fmt.Errorf("%s %s is there already, in state %s: %w", noun(k), name, from, errdefs.ErrAlreadyExists)
	case from == Absent || from == Deleted:
		return fmt.Errorf("%s %s: %w", noun(k), name, errdefs.ErrNotFound)
	case req == ReqKill && from == Stopped:
		// containerd's clients take NotFound for "it has ended already"; that is what kill(2) says too.
		return fmt.Errorf("%s %s has ended: process already finished: %w", noun(k), name, errdefs.ErrNotFound)
	}
	return fmt.Errorf("cannot %s %s %s: it is %s, must be %s: %w",
		req, noun(k), name, from, or(From(k, req)), errdefs.ErrFailedPrecondition)
}

// MustNext is Next for a step that our own code decided on: an illegal one is a bug and panics.
func MustNext(k Kind, from State, req Request) State {
	t, ok := Next(k, from, req)
	if !ok {
		panic(fmt.Sprintf("shimapi: illegal internal step: %s of %s process in state %s", req, k, from))
	}
	return t.To
}

// From lists the states in which a request is legal.
func From(k Kind, req Request) []State {
	var out []State
	for _, s := range States {
		if _, ok := Next(k, s, req); ok {
			out = append(out, s)
		}
	}
	return out
}

func noun(k Kind) string {
	if k == Init {
		return "container"
	}
	return "exec"
}

func or(states []State) string {
	s := make([]string, len(states))
	for i := range states {
		s[i] = string(states[i])
	}
	if len(s) == 0 {
		return "in no state at all"
	}
	return strings.Join(s, " or ")
}
