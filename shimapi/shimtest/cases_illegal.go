package shimtest

import (
	"fmt"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/shimapi"
)

// ofExecs are the requests that name an exec.
var ofExecs = []shimapi.Request{
	shimapi.ReqCreate, shimapi.ReqStart, shimapi.ReqState, shimapi.ReqKill, shimapi.ReqWait, shimapi.ReqResizePty,
	shimapi.ReqCloseIO, shimapi.ReqDelete,
}

// illegal asks for everything that the lifecycle table forbids in a state, and judges the codes of the refusals. A second
// create comes last: a shim that does not refuse it at once may do harm.
func (sh *shim) illegal(kind shimapi.Kind, state shimapi.State, execID string) {
	sh.t.Helper()
	all := shimapi.Requests
	if kind == shimapi.Exec {
		all = ofExecs
	}
	var forbidden []shimapi.Request
	for _, req := range all {
		if _, legal := shimapi.Next(kind, state, req); !legal && req != shimapi.Exited && req != shimapi.ReqCreate {
			forbidden = append(forbidden, req)
		}
	}
	if state != shimapi.Absent && state != shimapi.Deleted {
		forbidden = append(forbidden, shimapi.ReqCreate)
	}
	for _, req := range forbidden {
		err := sh.ask(req, execID)
		want := shimapi.Check(kind, "", state, req)
		key := fmt.Sprintf("illegal/%s/%s/%s", kind, state, req)
		sh.expect(key+"/refused", err != nil && !timedOut(err), "%v", err)
		if err != nil {
			sh.expect(key+"/code", errdefs.Resolve(err) == errdefs.Resolve(want), "answered %q, which is %v, want %v", err, errdefs.Resolve(err), errdefs.Resolve(want))
		}
	}
}

// still judges that refusals changed nothing.
func (sh *shim) still(execID string, want tasktypes.Status) {
	sh.t.Helper()
	st, err := request(sh.State, stateOf(sh.id, execID))
	sh.expect("illegal/unchanged", err == nil && st.Status == want, "the state is %v, %v, want %v", st, err, want)
}

func illegalAbsentCase(sh *shim) { sh.illegal(shimapi.Init, shimapi.Absent, "") }

func illegalCreatedCase(sh *shim) {
	sh.created(nil, nil)
	sh.illegal(shimapi.Init, shimapi.Created, "")
	sh.still("", tasktypes.Status_CREATED)
}

func illegalRunningCase(sh *shim) {
	sh.running(nil)
	sh.illegal(shimapi.Init, shimapi.Running, "")
	sh.still("", tasktypes.Status_RUNNING)
}

func illegalPausedCase(sh *shim) {
	sh.running(nil)
	sh.must("Pause", sh.ask(shimapi.ReqPause, ""))
	sh.illegal(shimapi.Init, shimapi.Paused, "")
	sh.still("", tasktypes.Status_PAUSED)
	sh.must("Resume", sh.ask(shimapi.ReqResume, ""))
}

func illegalStoppedCase(sh *shim) {
	sh.running(newSpec(sh.id, "true"))
	sh.wait("")
	sh.illegal(shimapi.Init, shimapi.Stopped, "")
	sh.still("", tasktypes.Status_STOPPED)
}

func illegalDeletedCase(sh *shim) {
	sh.running(newSpec(sh.id, "true"))
	sh.wait("")
	sh.remove("")
	sh.illegal(shimapi.Init, shimapi.Deleted, "")
}

func illegalExecsCase(sh *shim) {
	sh.running(nil)
	sh.illegal(shimapi.Exec, shimapi.Absent, "e0")

	sh.must("Exec", sh.addExec("e1", nil, "sleep", "1000"))
	sh.illegal(shimapi.Exec, shimapi.Created, "e1")
	sh.still("e1", tasktypes.Status_CREATED)

	sh.startExec("e2", "sleep", "1000")
	sh.illegal(shimapi.Exec, shimapi.Running, "e2")
	sh.still("e2", tasktypes.Status_RUNNING)

	sh.startExec("e3", "true")
	sh.wait("e3")
	sh.illegal(shimapi.Exec, shimapi.Stopped, "e3")
	sh.still("e3", tasktypes.Status_STOPPED)
	sh.remove("e3")
	sh.illegal(shimapi.Exec, shimapi.Deleted, "e3")
	sh.still("", tasktypes.Status_RUNNING)
}
