package shimtest

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
)

// checkpointCase: a checkpoint leaves the container running, whether it can be made or not. Where criu does not work, the
// error names it, and nothing of the checkpoint is left.
func checkpointCase(sh *shim) {
	pid := sh.running(nil)
	path := filepath.Join(sh.bundle, "images")
	_, err := request(sh.Checkpoint, &task.CheckpointTaskRequest{ID: sh.id, Path: path})
	_, file := os.Stat(filepath.Join(path, "inventory.img"))
	if works := exec.Command("criu", "check").Run() == nil; works {
		sh.expect("checkpoint/made", err == nil && file == nil, "%v, %v", err, file)
		told := func(seen []published) bool {
			return slices.ContainsFunc(seen, func(e published) bool { return e.topic == "/tasks/checkpointed" })
		}
		sh.expect("checkpoint/event", told(sh.events.waitFor(told)), "nobody was told")
	} else {
		sh.expect("checkpoint/refused", err != nil && !timedOut(err), "answered %v", err)
		sh.expect("checkpoint/says", err != nil && strings.Contains(err.Error(), "criu"), "answered %v", err)
		_, dir := os.Stat(path)
		sh.expect("checkpoint/left", errors.Is(dir, fs.ErrNotExist), "the directory of the images: %v", dir)
	}
	st := sh.state("")
	sh.expect("checkpoint/state", st.Status == tasktypes.Status_RUNNING && int(st.Pid) == pid && alive(pid), "%v", st)
	_ = os.RemoveAll(path)

	sh.startExec("e1", "true")
	sh.expect("checkpoint/exec", sh.wait("e1").ExitStatus == 0, "status %d", sh.wait("e1").ExitStatus)
}

// noCheckpointCase: a container is not made of what is no checkpoint, at Create or at Start, and nothing is left of it.
func noCheckpointCase(sh *shim) {
	_, err := sh.create(newSpec(sh.id, "true"), func(r *task.CreateTaskRequest) { r.Checkpoint = filepath.Join(sh.bundle, "nothing") })
	if err == nil {
		_, err = request(sh.Start, &task.StartRequest{ID: sh.id})
	}
	sh.expect("no checkpoint/refused", err != nil && !timedOut(err), "answered %v", err)
}
