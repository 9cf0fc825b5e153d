package tasks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/eventlog"
	"github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/parking"
	"github.com/managerd/managerd/manager/shims"
	wire "github.com/managerd/managerd/shimapi/parking"
	"github.com/managerd/managerd/shimapi/shimfake"
)

// realShim is shim-runc, built when the first test needs it.
var realShim struct {
	once sync.Once
	dir  string
	path string
	err  error
}

func TestMain(m *testing.M) {
	if shimfake.Called() {
		os.Exit(shimfake.Main())
	}
	code := m.Run()
	if realShim.dir != "" {
		_ = os.RemoveAll(realShim.dir)
	}
	os.Exit(code)
}

func shimRunc(t testing.TB) string {
	t.Helper()
	r := &realShim
	r.once.Do(func() {
		if dir := os.Getenv("MANAGERD_BIN_DIR"); dir != "" {
			r.path = filepath.Join(dir, shims.BinaryName)
			return
		}
		if r.dir, r.err = os.MkdirTemp("", "managerd-tasks-"); r.err != nil {
			return
		}
		r.path = filepath.Join(r.dir, shims.BinaryName)
		cmd := exec.Command("go", "build", "-tags", "seccomp no_grpc netgo osusergo", "-o", r.path, "github.com/managerd/managerd/cmd/shim-runc")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			r.err = fmt.Errorf("cannot build shim-runc: %w\n%s", err, out)
		}
	})
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.path
}

// world is a daemon's worth of tasks, over a state directory that outlives it.
type world struct {
	t        testing.TB
	state    string
	binary   string
	faults   string
	ttrpc    string
	log      *safeBuffer
	exchange *events.Exchange
	journal  *eventlog.Log // nil: events are not kept
	shims    *shims.Manager
	bundles  *bundle.Store
	lot      *parking.Lot
	*Service

	mu         sync.Mutex
	containers map[string]containers.Container
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// fakes is a world of fake shims.
func fakes(t *testing.T) *world {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Setenv(shimfake.EnvFaults, dir)
	w := newWorld(t, self)
	w.faults = dir
	return w
}

func newWorld(t testing.TB, binary string) *world {
	t.Helper()
	w := &world{t: t, binary: binary, log: &safeBuffer{}, containers: map[string]containers.Container{}}
	var err error
	if w.state, err = os.MkdirTemp("", "managerd-state-"); err != nil {
		t.Fatal(err)
	}
	w.ttrpc = filepath.Join(w.state, "managerd.sock.ttrpc")
	w.begin()
	t.Cleanup(w.end)
	return w
}

// begin is a daemon's start; the channel is closed when all has been adopted.
func (w *world) begin() <-chan struct{} {
	w.t.Helper()
	log := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	if w.bundles, err = bundle.NewStore(w.state); err != nil {
		w.t.Fatal(err)
	}
	w.exchange = events.NewExchange()
	if w.journal != nil {
		w.exchange.Keep(w.journal)
	}
	w.exchange.Open()
	lot, err := parking.Open(filepath.Join(w.state, wire.SocketName), nil, log)
	if err != nil {
		w.t.Fatal(err)
	}
	w.lot = lot
	w.shims = shims.New(shims.Config{
		Lot: lot, State: w.state, Binary: w.binary, Address: filepath.Join(w.state, "managerd.sock"), TTRPCAddress: w.ttrpc, Debug: true, Log: log,
	})
	w.Service = New(w.bundles, w.shims, store{w}, w.exchange, log)
	if err := w.Recover(); err != nil {
		w.t.Fatal(err)
	}
	done, err := w.Adopt(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return done
}

func (w *world) stop() {
	w.Close()
	w.lot.Close()
}

// restart is what kill -9 and a new start are to the shims.
func (w *world) restart() {
	w.t.Helper()
	w.stop()
	<-w.begin()
}

// end deletes what is left, and fails the test when that leaves anything.
func (w *world) end() {
	if w.faults != "" {
		if err := os.RemoveAll(w.faults); err != nil {
			w.t.Error(err)
		}
		if err := os.Mkdir(w.faults, 0o700); err != nil {
			w.t.Error(err)
		}
	}
	ctx, cancel := context.WithTimeout(in("ns"), 20*time.Second)
	defer cancel()
	left, err := w.List(ctx)
	if err != nil {
		w.t.Error(err)
	}
	for _, st := range left {
		w.remove(ctx, st.ID)
	}
	w.stop()
	w.clean()
	if w.t.Failed() {
		w.t.Logf("log:\n%s", w.log)
	}
	if err := os.RemoveAll(w.state); err != nil {
		w.t.Error(err)
	}
}

// remove takes a task away, whatever its state.
func (w *world) remove(ctx context.Context, id string) {
	w.t.Helper()
	if err := w.Kill(ctx, id, "", 9, true); err == nil {
		_, _, err = w.Wait(ctx, id, "")
		if err != nil && !errdefs.IsUnavailable(err) {
			w.t.Errorf("%s: wait: %v", id, err)
		}
	}
	if _, err := w.Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		w.t.Errorf("%s: delete: %v", id, err)
	}
}

// clean fails the test when there is a bundle, a socket, a mount or a process left.
func (w *world) clean() {
	w.t.Helper()
	for _, dir := range []string{filepath.Join(w.state, bundle.Dir, "*", "*"), filepath.Join(w.state, "s", "*")} {
		if left, err := filepath.Glob(dir); err != nil || len(left) > 0 {
			w.t.Errorf("left: %v, %v", left, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), w.state) {
		w.t.Errorf("a mount is left: %v", err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) { // a process ends a moment after its socket
		left := w.processes()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.t.Errorf("processes are left: %q", left)
			return
		}
	}
}

// processes are the shims of this world, by their command lines.
func (w *world) processes() (out []string) {
	w.t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, path := range all {
		line, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(line), w.state) {
			out = append(out, filepath.Base(filepath.Dir(path))+" "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return out
}

func in(ns string) context.Context { return namespaces.With(context.Background(), ns) }

// store is the container store of a world.
type store struct{ w *world }

func (s store) Get(_ context.Context, id string) (containers.Container, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	c, ok := s.w.containers[id]
	if !ok {
		return c, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// add enters a container.
func (w *world) add(id string, spec any, runtime string) {
	w.t.Helper()
	data, ok := spec.([]byte)
	if !ok {
		var err error
		if data, err = json.Marshal(spec); err != nil {
			w.t.Fatal(err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.containers[id] = containers.Container{ID: id, Spec: &anypb.Any{Value: data}, Runtime: containers.Runtime{Name: runtime}}
}

// args is the spec of a fake's process.
func args(a ...string) any { return map[string]any{"process": map[string]any{"args": a}} }

// run makes and starts a task.
func (w *world) run(id string, spec any) uint32 {
	w.t.Helper()
	w.add(id, spec, shims.DefaultRuntime)
	pid, err := w.Create(in("ns"), CreateRequest{ID: id})
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.Start(in("ns"), id, ""); err != nil {
		w.t.Fatal(err)
	}
	return pid
}

// fault says what goes wrong with the shim of a task from now on.
func (w *world) fault(id string, f shimfake.Faults) {
	w.t.Helper()
	if err := shimfake.WriteFaults(w.faults, id, f); err != nil {
		w.t.Fatal(err)
	}
}

// shimPid is the process that keeps a task.
func (w *world) shimPid(id string) int {
	w.t.Helper()
	b, err := w.bundles.Load("ns", id)
	if err != nil {
		w.t.Fatal(err)
	}
	records, err := b.Ledger()
	if err != nil || len(records) == 0 {
		w.t.Fatalf("ledger: %v, %v", records, err)
	}
	pid := 0
	for _, r := range records { // of the newest
		if r.Header != nil {
			pid = int(r.Header.ShimPid)
		}
	}
	return pid
}

// recorder collects events in the background.
type recorder struct {
	sub *events.Subscription
	mu  sync.Mutex
	got []*types.Envelope
	new chan struct{}
	end context.CancelFunc
}

func (w *world) record(filters ...string) *recorder {
	w.t.Helper()
	sub, err := w.exchange.Subscribe(filters...)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &recorder{sub: sub, new: make(chan struct{}, 1), end: cancel}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			e, err := sub.Next(ctx)
			if err != nil {
				return
			}
			r.mu.Lock()
			r.got = append(r.got, e)
			r.mu.Unlock()
			select {
			case r.new <- struct{}{}:
			default:
			}
		}
	}()
	w.t.Cleanup(func() { cancel(); <-done; sub.Close() })
	return r
}

// topics are the events of a container, each with its exit status where it has one.
func (r *recorder) topics(id string) (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.got {
		v, err := typeurl.UnmarshalAny(e.Event)
		if err != nil {
			return []string{err.Error()}
		}
		if c, ok := v.(interface{ GetContainerID() string }); !ok || c.GetContainerID() != id {
			continue
		}
		topic := strings.TrimPrefix(e.Topic, "/tasks/")
		if x, ok := v.(*eventtypes.TaskExit); ok {
			topic = fmt.Sprintf("%s %s=%d", topic, x.ID, x.ExitStatus)
		}
		out = append(out, topic)
	}
	return out
}

// await waits until a container's events are want, and fails when they are not in time.
func (r *recorder) await(t testing.TB, id string, want ...string) {
	t.Helper()
	timeout := time.After(15 * time.Second)
	for {
		got := r.topics(id)
		if strings.Join(got, ",") == strings.Join(want, ",") {
			return
		}
		select {
		case <-r.new:
		case <-timeout:
			t.Fatalf("events of %s:\n got %q\nwant %q", id, got, want)
		}
	}
}

// eventually waits for something that has no event.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

func isDeadline(err error) bool { return errors.Is(err, context.DeadlineExceeded) }
