package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/api/events"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"

	managerapi "github.com/managerd/managerd/protos/manager/v1"
	"github.com/managerd/managerd/shimapi/ledger"
	"github.com/managerd/managerd/test/harness"
)

// patience is how long the run over one failpoint may take.
const patience = 90 * time.Second

// run does everything once, with one failpoint armed.
type run struct {
	*client
	name   string // of the failpoint
	id     string // of the container, and part of every other name
	d      *harness.Daemon
	j      *journal
	watch  *warden
	store  *harness.FDStore
	armory string
	m      *monkey
	want   map[string]int // events: "TOPIC NAME EXEC"
}

// before are those that must have struck for another to be reached.
var before = map[string][]string{
	"shim.cleanup.removed": {"shim.create.forked"},
}

// starting begins the names of those at which a shim may be killed while an exec is being started.
var starting = []string{"shim.startexec.", "external.exec.", "logsink."}

func (r *run) all() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	if r.client, err = dial(ctx, r.d); err != nil {
		return err
	}
	defer func() { _ = r.conn.Close() }()
	r.m, r.want = &monkey{d: r.d, j: r.j}, map[string]int{}
	for _, name := range append(slices.Clone(before[r.name]), r.name) {
		if err := os.WriteFile(filepath.Join(r.armory, name), nil, 0o600); err != nil {
			return err
		}
	}
	since, err := r.newest()
	if err != nil {
		return err
	}
	steps := []func() error{r.content, r.snapshot, r.container}
	if strings.HasPrefix(r.name, "tasks.dead.") {
		steps = []func() error{r.dead}
	}
	if strings.HasPrefix(r.name, "gc.") {
		steps = []func() error{r.garbage}
	}
	if strings.HasPrefix(r.name, "mounts.") {
		steps = []func() error{r.activation}
	}
	if strings.HasPrefix(r.name, "content.partial.") {
		steps = []func() error{r.pull}
	}
	if strings.HasPrefix(r.name, "eventlog.segment.") {
		steps = []func() error{r.roll, func() error { since, err = r.newest(); return err }, r.container}
	}
	if strings.HasPrefix(r.name, "parking.vault.") {
		steps = []func() error{r.heldTerminal}
	}
	if strings.HasPrefix(r.name, "external.") {
		steps = []func() error{r.container}
		path, err := exec.LookPath("runc")
		if err != nil {
			return fmt.Errorf("%w (Debian: apt-get install runc)", err)
		}
		if r.options, err = typeurl.MarshalAnyToProto(&options.Options{BinaryName: path}); err != nil {
			return err
		}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(r.armory, r.name+".hit")); err != nil {
		return errors.New("nobody got there")
	}
	if _, err := r.again("look for what is left", r.empty, nil); err != nil { // whoever got there may only now be killed
		return err
	}
	if left := r.watch.left(r.d); len(left) > 0 {
		return fmt.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	if !r.store.Empty(patience) {
		return errors.New("the service manager keeps descriptors of containers that are gone")
	}
	if _, err := r.again("look at what is stored", r.stored, nil); err != nil {
		return err
	}
	return r.told(since)
}

// container is the life of one: execs, an upgrade of its shim and that one's death in between.
func (r *run) container() error {
	const code, lines = 42, 100
	path := filepath.Join(r.d.Dir, r.id)
	script := numbered(lines) + fmt.Sprintf("sleep 1000 & trap 'exit %d' TERM; >/ready; wait", code)
	if err := r.make(r.id, script, "json-file://"+path+"?max-size=1k&max-file=100"); err != nil {
		return err
	}
	if _, err := r.start(r.id, ""); err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return r.execute("e0") }, r.upgrade, func() error { return r.execute("e1") }, r.kill, func() error { return r.execute("e2") },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	l := &load{client: r.client, j: r.j}
	if err := l.end(r.id, uint32(unix.SIGTERM)); err != nil {
		return err
	}
	got, err := r.wait(r.id, "")
	if err != nil || got != code {
		return fmt.Errorf("it ended with %d, not %d: %v", got, code, err)
	}
	if n, _, err := countRotated("json-file", path); err != nil || n != lines {
		return fmt.Errorf("%d of %d lines: %v", n, lines, err)
	}
	r.life()
	return r.remove(r.id, got)
}

// life is what is told of a container.
func (r *run) life() {
	for _, topic := range []string{"/containers/create", "/snapshot/prepare", "/snapshot/remove", "/containers/delete", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"} {
		r.want[topic+" "+r.id+" "]++
	}
}

// execute runs an exec; one that may not have run, since its shim was killed while it started it, is deleted and made again.
func (r *run) execute(name string) error {
	again, err := r.attempt(name, filepath.Join(r.d.Dir, r.id+"."+name))
	if again && err == nil {
		if again, err = r.attempt(name, filepath.Join(r.d.Dir, r.id+"."+name+".again")); again && err == nil {
			err = fmt.Errorf("exec %s: its shim has died under it twice", name)
		}
	}
	return err
}

// attempt runs an exec once, and says whether it may not have run.
func (r *run) attempt(name, path string) (again bool, err error) {
	const code, lines = 7, 20
	got, cut, err := r.exec(r.id, name, "until [ -e /ready ]; do usleep 1000; done; "+numbered(lines)+fmt.Sprintf("exit %d", code), "file://"+path)
	if err != nil {
		return false, err
	}
	for _, topic := range []string{"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"} {
		r.want[topic+" "+r.id+" "+name]++
	}
	if got == unknownStatus && cut > 0 && slices.ContainsFunc(starting, func(p string) bool { return strings.HasPrefix(r.name, p) }) {
		why, err := r.unknown(name)
		if err != nil {
			return false, err
		}
		if again = strings.Contains(why, "being started"); again {
			r.want["/tasks/exec-started "+r.id+" "+name]--
			if _, _, err := countFile("file", path); err != nil && !errors.Is(err, os.ErrNotExist) { // as far as it came
				return false, err
			}
		} // else its pid was known, and nobody had a pidfd of it yet
	} else if n, _, err := countFile("file", path); err != nil || n != lines || got != code {
		return false, fmt.Errorf("exec %s ended with %d, not %d; %d of %d lines; %v", name, got, code, n, lines, err)
	}
	return again, r.deleteExec(r.id, name, got)
}

// unknown is why nobody knows how an exec ended, as the ledger has it.
func (r *run) unknown(exec string) (why string, err error) {
	records, err := ledger.Read(filepath.Join(r.d.State(), "io.containerd.runtime.v2.task", r.ns, r.id, "ledger"))
	if err != nil {
		return "", err
	}
	for _, rec := range records {
		if rec.Exit != nil && rec.Exit.ExecId == exec && rec.Exit.Unknown != "" {
			return rec.Exit.Unknown, nil
		}
	}
	return "", fmt.Errorf("exec %s ended with %d, and the ledger does not say why", exec, unknownStatus)
}

// upgrade replaces the shim's code, however many tries it takes: it may be killed meanwhile.
func (r *run) upgrade() error {
	for {
		_, err := harness.Output(r.d.Mctl("shim", "upgrade", r.id, "--state", r.d.State(), "--binary", filepath.Join(r.d.Bin, "shim-runc"), "--timeout", "5s"))
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-r.ctx.Done():
			return fmt.Errorf("%w: %w", err, r.ctx.Err())
		}
	}
}

// kill kills the shim, and returns when a successor answers.
func (r *run) kill() error {
	var all []*victim
	err := r.await("one shim keeps it", func() bool { // one that never did may still be ending
		for _, v := range all {
			v.close()
		}
		all = r.m.victims(func(id string) bool { return id == r.id })
		return len(all) == 1
	})
	if err != nil {
		return err
	}
	pid := all[0].pid
	_ = all[0].signal(unix.SIGKILL)
	all[0].close()
	for {
		if d, err := r.m.describe(r.id); err == nil && int(d.Pid) != pid {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-r.ctx.Done():
			return fmt.Errorf("no successor comes: %w", r.ctx.Err())
		}
	}
}

// dead is a container that ends while no shim lives, and none can.
func (r *run) dead() error {
	if err := r.make(r.id, "exec sleep 1000", ""); err != nil {
		return err
	}
	if _, err := r.start(r.id, ""); err != nil {
		return err
	}
	resp, err := r.tasks.Get(r.ctx, &tasksapi.GetRequest{ContainerID: r.id})
	if err != nil {
		return err
	}
	program := filepath.Join(r.d.Bin, "shim-runc")
	if err := os.Rename(program, program+".away"); err != nil {
		return err
	}
	for _, v := range r.m.victims(func(id string) bool { return id == r.id }) {
		_ = v.signal(unix.SIGKILL)
		v.close()
	}
	err = unix.Kill(int(resp.Process.Pid), unix.SIGKILL)
	if err == nil {
		_, err = r.again("look at the task", func() error {
			for {
				resp, err := r.tasks.Get(r.ctx, &tasksapi.GetRequest{ContainerID: r.id})
				if err != nil || resp.Process.ExitStatus == unknownStatus {
					return err
				}
				select {
				case <-time.After(5 * time.Millisecond):
				case <-r.ctx.Done():
					return r.ctx.Err()
				}
			}
		}, nil)
	}
	if err := errors.Join(err, os.Rename(program+".away", program)); err != nil {
		return err
	}
	r.life()
	// A daemon that is started meanwhile can have a shim again, to which the parked pidfd tells the status.
	return r.remove(r.id, unknownStatus, 128+uint32(unix.SIGKILL))
}

// newest is the number of the last event.
func (r *run) newest() (last uint64, err error) {
	_, err = r.events(0, func(seq uint64, _ string) { last = seq })
	return last, err
}

// events gives those of the namespace above a number, each as "TOPIC NAME EXEC".
func (r *run) events(since uint64, fn func(seq uint64, what string)) (cut int, err error) {
	return r.again("replay", func() error {
		s, err := managerapi.NewEventsClient(r.conn).Replay(r.ctx, &managerapi.ReplayRequest{SinceSeq: since, Filters: []string{"namespace==" + r.ns}})
		for err == nil {
			var e *managerapi.ReplayResponse
			if e, err = s.Recv(); err == nil {
				since = max(since, e.Seq)
				if e.Lost {
					return errors.New("events are lost")
				}
				if e.Topic != "" {
					fn(e.Seq, e.Topic+" "+subject(e))
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}, nil)
}

// subject is what an event is about.
func subject(e *managerapi.ReplayResponse) string {
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return err.Error()
	}
	switch v := v.(type) {
	case *events.TaskExecAdded:
		return v.ContainerID + " " + v.ExecID
	case *events.TaskExecStarted:
		return v.ContainerID + " " + v.ExecID
	case *events.TaskExit:
		return v.ContainerID + " " + strings.TrimPrefix(v.ID, v.ContainerID)
	case interface{ GetContainerID() string }:
		return v.GetContainerID() + " "
	case interface{ GetKey() string }:
		return v.GetKey() + " "
	case interface{ GetDigest() string }:
		return v.GetDigest() + " "
	case interface{ GetID() string }:
		return v.GetID() + " "
	}
	return ""
}

// told holds the events of this run against what was done: each once.
func (r *run) told(since uint64) error {
	var wrong []string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) { // the last one comes when it comes
		got := map[string]int{}
		if _, err := r.events(since, func(_ uint64, what string) { got[what]++ }); err != nil {
			return err
		}
		wrong = nil
		for what, n := range r.want {
			if got[what] != n {
				wrong = append(wrong, fmt.Sprintf("%s: told %d times", what, got[what]))
			}
		}
		for what, n := range got {
			if n > r.want[what] && strings.Contains(what, r.id) && r.want[what] == 0 {
				wrong = append(wrong, fmt.Sprintf("%s: told %d times, though it did not happen", what, n))
			}
		}
		slices.Sort(wrong)
		if len(wrong) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New(strings.Join(wrong, "; "))
		}
	}
}
