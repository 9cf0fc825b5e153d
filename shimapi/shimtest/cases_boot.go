package shimtest

import (
	"os"
	"path/filepath"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// bootCase is what a booted shim is before anything is asked of it.
func bootCase(sh *shim) {
	if !sh.form.serve {
		json := strings.HasPrefix(sh.printed, "{")
		sh.expect("start/form", json == (sh.form.version == 3), "printed %q to a daemon that knows version %d", sh.printed, sh.form.version)
		data, err := os.ReadFile(filepath.Join(sh.bundle, shimapi.AddressFile))
		sh.expect("start/address file", err == nil && strings.TrimSpace(string(data)) == sh.params.Address, "%q, %v", data, err)
	}
	sh.expect("start/version", sh.params.Version == sh.form.version, "speaks version %d", sh.params.Version)
	sid, err := unix.Getsid(sh.pid)
	own, oerr := unix.Getsid(0)
	sh.expect("start/session", err == nil && oerr == nil && sid != own, "the shim is in the daemon's session")

	conn, err := request(sh.Connect, &task.ConnectRequest{ID: sh.id})
	sh.expect("connect/before create", err == nil && conn.TaskPid == 0 && int(conn.ShimPid) == sh.pid, "%v, %v", conn, err)
	if _, err := request(sh.State, stateOf("another", "")); true {
		sh.expect("state/other id", errdefs.IsNotFound(err), "%v", err)
	}
	fi, err := os.Stat(sh.socketPath())
	sh.expect("start/socket mode", err == nil && fi.Mode().Perm()&0o077 == 0, "others can reach the socket: %v, %v", fi.Mode(), err)
}

func stateOf(id, execID string) *task.StateRequest { return &task.StateRequest{ID: id, ExecID: execID} }

// sigtermCase: a signal that is meant for something else, or a service manager that stops the daemon's unit, must cost
// nobody a container.
func sigtermCase(sh *shim) {
	pid := sh.running(nil)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		sh.must("signal the shim", unix.Kill(sh.pid, sig))
	}
	// One that ends of them takes a moment to, and may answer meanwhile.
	var err error
	ended := until(time.Second, func() bool { _, err = request(sh.State, stateOf(sh.id, "")); return err != nil })
	sh.expect("sigterm/shim", !ended, "the shim does not answer after SIGTERM, SIGINT and SIGHUP: %v", err)
	sh.expect("sigterm/container", alive(pid), "the container died of signals to its shim")
	if ended {
		sh.dead = true
		_ = unix.Kill(sh.pid, unix.SIGKILL)
		sh.deleteVerb()
		_ = os.Remove(sh.socketPath()) // which one that ends by itself may have done, or not
		sh.params.Address = ""
	}
}

// shimKilledCase: the container outlives its shim, and the verb "delete" takes away what is left.
func shimKilledCase(sh *shim) {
	pid := sh.running(nil)
	sh.startExec("e1", "sleep", "1000")
	sh.killShim()
	sh.expect("shim killed/container", alive(pid), "the container died with its shim")
	resp := sh.deleteVerb()
	sh.expect("delete verb/status", resp.ExitStatus == 137, "status %d", resp.ExitStatus)
	sh.expect("delete verb/pid", int(resp.Pid) == pid, "pid %d, the container's was %d", resp.Pid, pid)
	sh.expect("delete verb/exited at", resp.ExitedAt != nil && !resp.ExitedAt.AsTime().IsZero(), "no time")
	sh.expect("delete verb/container", eventually(func() bool { return !alive(pid) }), "process %d lives on", pid)
	_, err := sh.verb(shimapi.VerbDelete)
	sh.expect("delete verb/twice", err == nil, "%v", err)
}

// shimKilledAfterExitCase: a status that the shim knew when it died is not lost.
func shimKilledAfterExitCase(sh *shim) {
	sh.running(newSpec(sh.id, "sh", "-c", "exit 42"))
	sh.wait("")
	sh.killShim()
	resp := sh.deleteVerb()
	sh.expect("delete verb/known status", resp.ExitStatus == 42, "status %d, the shim had told 42", resp.ExitStatus)
}

// deleteNothingCase: the daemon runs "delete" also after a start that came to nothing.
func deleteNothingCase(sh *shim) {
	sh.killShim()
	_, err := sh.verb(shimapi.VerbDelete)
	sh.expect("delete verb/nothing", err == nil, "%v", err)
}

// shutdownCase: a shim with a container stays, one without goes.
func shutdownCase(sh *shim) {
	pid := sh.running(nil)
	_, err := request(sh.Shutdown, &task.ShutdownRequest{ID: sh.id})
	sh.expect("shutdown/in use", err == nil, "%v", err)
	st, err := request(sh.State, stateOf(sh.id, ""))
	sh.expect("shutdown/shim", err == nil, "%v, %v", st, err)
	sh.expect("shutdown/container", alive(pid), "the container died of Shutdown")
}
