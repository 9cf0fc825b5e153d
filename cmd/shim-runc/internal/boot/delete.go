package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/service"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/ledger"
	"github.com/managerd/managerd/shimapi/mount"
)

// unknownExit is the status of a container whose shim died before it saw the exit: containerd's convention for "killed".
const unknownExit = 137

// retirement is how long a shim that lives after all is given to take its container down itself.
const retirement = 5 * time.Second

// remove is containerd's verb "delete": it takes away what a shim left, and prints how the container ended. The daemon
// runs it when it believes the shim dead; one that lives is told to end, so that it does not stay for ever. Each step is
// tried whatever became of the others.
func remove(a *args, stdout, stderr io.Writer) error {
	address := filepath.Join(a.bundle, shimapi.AddressFile)
	if data, err := os.ReadFile(address); err == nil {
		socket := strings.TrimSpace(string(data))
		retire(a.id, socket)
		_ = os.Remove(strings.TrimPrefix(socket, "unix://"))
	}
	r, err := reaper.New()
	if err != nil {
		return err
	}
	defer r.Close()
	opts := service.KeptOptions(a.bundle)
	e, err := service.NewEngine(engine.Config{
		Root: service.StateRoot(a.bundle, a.namespace, opts), SystemdCgroup: opts.SystemdCgroup, Reaper: r,
	}, opts.BinaryName)
	if err != nil {
		return err
	}
	if err := errors.Join(service.RemoveSandbox(a.bundle, r), e.Remove(a.id, a.bundle), mount.Unmount(filepath.Join(a.bundle, shimapi.RootfsDir))); err != nil {
		return err
	}
	failpoint.Hit("shim.cleanup.removed")
	out, err := proto.Marshal(ending(a, stderr))
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}

// retire asks a shim to delete its container and to end; one that is dead or does not answer is left to the rest.
func retire(id, socket string) {
	ctx, cancel := context.WithTimeout(context.Background(), retirement)
	defer cancel()
	c, err := shimapi.Dial(ctx, shimapi.BootstrapParams{Version: 3, Address: socket})
	if err != nil {
		return
	}
	defer func() { _ = c.Close() }()
	_, _ = c.Kill(ctx, &task.KillRequest{ID: id, Signal: 9, All: true})
	_, _ = c.Wait(ctx, &task.WaitRequest{ID: id})
	_, _ = c.Delete(ctx, &task.DeleteRequest{ID: id})
	_, _ = c.Sandbox().ShutdownSandbox(ctx, &api.ShutdownSandboxRequest{SandboxID: id})
	_, _ = c.Shutdown(ctx, &task.ShutdownRequest{ID: id})
}

// ending is how the container ended, by what its ledger knows.
func ending(a *args, stderr io.Writer) *task.DeleteResponse {
	resp := &task.DeleteResponse{ExitStatus: unknownExit, ExitedAt: timestamppb.Now()}
	records, err := ledger.Read(filepath.Join(a.bundle, shimapi.LedgerFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		_, _ = fmt.Fprintf(stderr, "shim-runc: %v\n", err) // what could be read is used
	}
	for _, rec := range records {
		switch {
		case rec.Process != nil && rec.Process.ExecId == "":
			resp.Pid = rec.Process.Pid
		case rec.Exit != nil && rec.Exit.ExecId == "":
			resp.ExitStatus, resp.ExitedAt = rec.Exit.Status, timestamppb.New(time.Unix(0, rec.Exit.ExitedUnixNano))
		}
	}
	return resp
}
