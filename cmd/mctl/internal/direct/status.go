package direct

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/bundle"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
)

// Condition is how a shim is.
type Condition string

// The conditions.
const (
	Lives        Condition = "ok"
	Unresponsive Condition = "unresponsive" // the process is there, or at least its socket is
	Dead         Condition = "dead"         // nobody listens
	Unreadable   Condition = "unreadable"   // the bundle does not say where it listens
)

// ending is how long to wait before a shim that has closed the connection is tried again.
const ending = 5 * time.Millisecond

// Status is what is known of a shim, from itself or, when it does not answer, from what it has written down.
type Status struct {
	Namespace    string     `json:"namespace"`
	ID           string     `json:"id"`
	PID          uint32     `json:"pid,omitempty"`
	Condition    Condition  `json:"condition"`
	Reason       string     `json:"reason,omitempty"`        // why it is not ok
	ProcessState string     `json:"process_state,omitempty"` // of /proc/PID/stat: T is stopped, D waits for a device
	Version      string     `json:"version,omitempty"`       // of the code in memory; of another's, its API
	Revision     string     `json:"revision,omitempty"`
	StartedAt    *time.Time `json:"started_at,omitempty"`
	State        string     `json:"state,omitempty"`         // of the container
	OOMKilled    bool       `json:"oom_killed,omitempty"`    // its init was, for want of memory
	ContainerPID uint32     `json:"container_pid,omitempty"` // of its init
	PSS          int64      `json:"pss,omitempty"`           // bytes
}

// Survey asks all shims at once; one that does not answer within answer is shown as such. In the order of shims.
func Survey(ctx context.Context, all []*Shim, answer time.Duration) []Status {
	out := make([]Status, len(all))
	var asking sync.WaitGroup
	for i, s := range all {
		asking.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, answer)
			defer cancel()
			out[i] = s.status(ctx)
		})
	}
	asking.Wait()
	return out
}

func (s *Shim) status(ctx context.Context) Status {
	st := Status{Namespace: s.Namespace, ID: s.Name(), Condition: Lives}
	err := s.reach(ctx, &st)
	for errdefs.IsUnavailable(err) { // it is just ending: a moment later nobody listens, or a successor does
		select {
		case <-time.After(ending):
			err = s.reach(ctx, &st)
			continue
		case <-ctx.Done():
		}
		break
	}
	if err != nil {
		st.Reason = err.Error()
		_, _, rerr := s.Bundle.Shim()
		switch {
		case rerr != nil:
			st.Condition = Unreadable
		case errdefs.IsNotFound(err):
			st.Condition = Dead
		default:
			st.Condition = Unresponsive
		}
		s.recall(&st)
	}
	if st.PID != 0 {
		st.ProcessState, st.PSS = processState(st.PID), pss(st.PID)
	}
	return st
}

// reach connects to the shim and asks it.
func (s *Shim) reach(ctx context.Context, st *Status) error {
	c, err := s.Dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	return s.ask(ctx, c, st)
}

// ask fills in what the shim says of itself.
func (s *Shim) ask(ctx context.Context, c *shimapi.Client, st *Status) error {
	d, err := c.Shim().Describe(ctx, &shim.DescribeRequest{})
	if err = shimapi.FromWire(err); errdefs.IsNotImplemented(err) {
		return s.askOther(ctx, c, st)
	} else if err != nil {
		return err
	}
	st.PID, st.Version, st.Revision, st.StartedAt = d.Pid, d.Version, d.Revision, new(d.StartedAt.AsTime())
	st.State = "none"
	if b := d.Sandbox; b.GetState() != "" {
		st.State, st.ContainerPID = b.State, b.Pid
	}
	for _, p := range d.Processes {
		if p.ExecId == "" {
			st.State, st.ContainerPID, st.OOMKilled = p.State, p.Pid, p.OomKilled
		}
	}
	return nil
}

// askOther is ask for a shim that is not ours.
func (s *Shim) askOther(ctx context.Context, c *shimapi.Client, st *Status) error {
	r, err := c.Connect(ctx, &task.ConnectRequest{ID: s.ID})
	if err != nil {
		return err
	}
	st.PID, st.Version, st.ContainerPID = r.ShimPid, "other, "+r.Version, r.TaskPid
	state, err := c.State(ctx, &task.StateRequest{ID: s.ID})
	if err != nil {
		return err
	}
	st.State = strings.ToLower(state.Status.String())
	return nil
}

// recall fills in what a shim that does not answer has written down.
func (s *Shim) recall(st *Status) {
	if h, err := s.Header(); err == nil && s.Keeps(h.Header.ShimPid) {
		st.PID, st.StartedAt = h.Header.ShimPid, new(time.Unix(0, h.UnixNano))
	}
	data, err := os.ReadFile(s.File(shimapi.TableDir + "/" + shimapi.TableName("")))
	p := &shimstate.Process{}
	if err != nil || p.Unmarshal(data) != nil {
		return
	}
	st.State, st.ContainerPID = p.State, p.Pid
	if p.State != string(shimapi.Stopped) && !bundle.InitAlive(p.Pid, p.StartTicks) {
		st.State, st.ContainerPID = "ended", 0 // and nobody has written it down yet
	}
}

// pss is the memory that a process takes, in bytes, what it shares divided among those who share it; 0 when it is not known.
func pss(pid uint32) int64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(data) {
		f := bytes.Fields(line)
		if len(f) == 3 && string(f[0]) == "Pss:" {
			kib, _ := strconv.ParseInt(string(f[1]), 10, 64)
			return kib << 10
		}
	}
	return 0
}
