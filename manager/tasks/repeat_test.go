package tasks

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/shims"
)

// TestRequestsSurvive: whatever is asked of a task whose shim has just died, or dies before it answers, is done by the
// successor, as if nothing had happened; of what cannot be done twice, and may have been done, it is said that it is not
// known.
func TestRequestsSurvive(t *testing.T) {
	const unknown = "unknown" // may be the answer if the shim dies under the request
	for _, mode := range []string{"dead", "dies"} {
		t.Run(mode, func(t *testing.T) {
			w := realWorld(t)
			in1, _ := fifo(t, "in")
			pid := w.run(CreateRequest{ID: "c1", Stdin: in1}, "/busybox cat; while :; do /busybox sleep 1; done")
			st := func(execID string, want tasktypes.Status) func(context.Context) error {
				return func(ctx context.Context) error {
					st, err := w.Service.Get(ctx, "c1", execID)
					if err == nil && st.Status != want && st.Status != tasktypes.Status_UNKNOWN {
						err = fmt.Errorf("%s is %s, not %s", execID, st.Status, want)
					}
					return err
				}
			}
			started := uint32(0)
			exec := `{"args":["/busybox","sleep","1000"],"cwd":"/"}`
			for _, step := range []struct {
				name  string
				may   string
				fn    func(context.Context) error
				after func(context.Context) error
			}{
				{"get", "", st("", tasktypes.Status_RUNNING), nil},
				{"close", "", func(ctx context.Context) error { return w.CloseIO(ctx, "c1", "", true) }, nil},
				{"pause", "", func(ctx context.Context) error { return w.Pause(ctx, "c1") }, st("", tasktypes.Status_PAUSED)},
				{"resume", "", func(ctx context.Context) error { return w.Resume(ctx, "c1") }, st("", tasktypes.Status_RUNNING)},
				{"pids", "", func(ctx context.Context) error {
					ps, err := w.Pids(ctx, "c1")
					if err == nil && !slices.ContainsFunc(ps, func(p *tasktypes.ProcessInfo) bool { return p.Pid == pid }) {
						err = fmt.Errorf("processes %v, without %d", ps, pid)
					}
					return err
				}, nil},
				{"update", "", func(ctx context.Context) error {
					return w.Update(ctx, "c1", &anypb.Any{
						TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: []byte(`{"cpu":{"shares":512}}`),
					}, nil)
				}, nil},
				{"exec", "", func(ctx context.Context) error { return w.Exec(ctx, execOf("c1", "e", exec)) }, st("e", tasktypes.Status_CREATED)},
				{"start", "", func(ctx context.Context) (err error) { started, err = w.Start(ctx, "c1", "e"); return err }, st("e", tasktypes.Status_RUNNING)},
				{"signal", unknown, func(ctx context.Context) error { return w.Kill(ctx, "c1", "", 18, false) }, nil},
				{"kill", "", func(ctx context.Context) error { return w.Kill(ctx, "c1", "e", 9, false) }, nil},
				{"rmexec", "", func(ctx context.Context) error {
					if status, _, err := w.Wait(ctx, "c1", "e"); err != nil || status != 137 {
						return fmt.Errorf("wait: %d, %w", status, err)
					}
					d, err := w.DeleteProcess(ctx, "c1", "e")
					if err == nil && (d.ExitStatus != 137 || d.Pid != started) {
						err = fmt.Errorf("%d ended with %d; %d was started", d.Pid, d.ExitStatus, started)
					}
					return err
				}, nil},
			} {
				ctx, cancel := context.WithTimeout(in("ns"), time.Minute)
				defer cancel()
				shim := w.shimPid("c1")
				_, conn, err := w.living(ctx, "c1")
				if err != nil {
					t.Fatal(err)
				}
				answered := make(chan error, 1)
				ask := func() { answered <- step.fn(ctx) }
				if mode == "dies" {
					freeze(t, shim)
					go ask()
					time.Sleep(20 * time.Millisecond) // it is on its way; should it not be, the step is that of the other mode
				}
				if err := unix.Kill(shim, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				if mode == "dead" {
					<-conn.Gone()
					ask()
				}
				if err := <-answered; err != nil && (step.may != unknown || mode == "dead" || !errdefs.IsUnknown(err)) {
					t.Fatalf("%s: %v", step.name, err)
				}
				if step.after != nil {
					if err := step.after(ctx); err != nil {
						t.Fatalf("after %s: %v", step.name, err)
					}
				}
				eventually(t, "a successor answers", func() bool { return w.shimPid("c1") != shim && answers(w, "c1") })
			}
		})
	}
}

func answers(w *reality, id string) bool {
	_, s, err := w.living(in("ns"), id)
	if err != nil {
		return false
	}
	_, err = s.State(in("ns"), &task.StateRequest{ID: id})
	return err == nil
}

// TestRequestsWithoutSuccessor: where none takes over, a request does not wait for ever for it.
func TestRequestsWithoutSuccessor(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	shim := w.shimPid("c1")
	if err := unix.Kill(shim, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for name, call := range requests(w, "c1") {
		if name == "delete" || name == "kill" || name == "get" { // these do without a shim
			continue
		}
		ctx, cancel := context.WithTimeout(in("ns"), 20*time.Second)
		if err := call(ctx); !errdefs.IsUnavailable(err) && !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
	if m, err := w.Metrics(in("ns"), filters.Always); err != nil || len(m) != 0 {
		t.Errorf("metrics: %v, %v", m, err)
	}
	if _, err := repeat(in("ns"), w.Service, "none", func(context.Context, *shims.Shim, bool) (any, error) { return nil, nil }); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}
