package tasks

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"

	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/shimapi/shimfake"
)

// TestCreateFails: whatever goes wrong, the client gets its code, nothing is left, and the next attempt works.
func TestCreateFails(t *testing.T) {
	for name, c := range map[string]struct {
		faults shimfake.Faults
		spec   any
		is     func(error) bool
		limit  time.Duration // of the client's patience; 0: none
	}{
		"shim does not boot":       {faults: shimfake.Faults{"Boot": {Message: "library is missing"}}, is: errdefs.IsUnavailable},
		"shim hangs at boot":       {faults: shimfake.Faults{"Boot": {Hang: true}}, is: isDeadline, limit: 100 * time.Millisecond},
		"shim refuses":             {faults: shimfake.Faults{"Create": {Code: codes.InvalidArgument, Message: "no"}}, is: errdefs.IsInvalidArgument},
		"shim crashes":             {faults: shimfake.Faults{"Create": {Crash: true}}, is: errdefs.IsUnavailable},
		"shim crashes late":        {faults: shimfake.Faults{"Create": {Crash: true, After: true}}, is: errdefs.IsUnavailable},
		"connection breaks":        {faults: shimfake.Faults{"Create": {Drop: true}}, is: errdefs.IsUnavailable},
		"connection breaks late":   {faults: shimfake.Faults{"Create": {Drop: true, After: true}}, is: errdefs.IsUnavailable},
		"client goes":              {faults: shimfake.Faults{"Create": {Delay: 300 * time.Millisecond}}, is: isDeadline, limit: 100 * time.Millisecond},
		"shim hangs":               {faults: shimfake.Faults{"Create": {Hang: true}}, is: isDeadline, limit: 100 * time.Millisecond},
		"undoing fails":            {faults: shimfake.Faults{"Create": {Code: codes.Internal}, "Shutdown": {Hang: true}}, is: errdefs.IsInternal},
		"malformed spec":           {spec: []byte(`{"process":`), is: errdefs.IsInvalidArgument},
		"spec of the wrong types":  {spec: []byte(`{"process":7}`), is: errdefs.IsInvalidArgument},
		"spec is empty":            {spec: []byte{}, is: errdefs.IsInvalidArgument},
		"shim does not say it all": {faults: shimfake.Faults{"Create": {After: true, Code: codes.Unknown, Message: "half way"}}, is: errdefs.IsUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			w := fakes(t)
			if c.spec == nil {
				c.spec = args("run")
			}
			w.add("c1", c.spec, shims.DefaultRuntime)
			w.fault("c1", c.faults)
			ctx, cancel := context.WithCancel(in("ns"))
			if c.limit > 0 {
				ctx, cancel = context.WithTimeout(in("ns"), c.limit)
			}
			defer cancel()
			if _, err := w.Create(ctx, CreateRequest{ID: "c1"}); err == nil || !c.is(err) {
				t.Errorf("create: %v", err)
			} else {
				t.Log(err)
			}
			w.clean()
			if _, err := w.Service.Get(in("ns"), "c1", ""); !errdefs.IsNotFound(err) {
				t.Errorf("get: %v", err)
			}
			w.fault("c1", nil)
			w.run("c1", args("run"))
		})
	}
}

func TestCreateUnknown(t *testing.T) {
	w := fakes(t)
	ctx := in("ns")
	if _, err := w.Create(ctx, CreateRequest{ID: "none"}); !errdefs.IsNotFound(err) {
		t.Errorf("no container: %v", err)
	}
	if _, err := w.Create(context.Background(), CreateRequest{ID: "none"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no namespace: %v", err)
	}
	noexec := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(noexec, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for runtime, is := range map[string]func(error) bool{
		"io.containerd.nosuch.v9": errdefs.IsNotFound,
		"nonsense":                errdefs.IsInvalidArgument,
		"io.containerd.../x.v1":   errdefs.IsInvalidArgument,
		"relative/path":           errdefs.IsInvalidArgument,
		"/no/such/shim":           errdefs.IsNotFound,
		noexec:                    errdefs.IsInvalidArgument,
		"/tmp":                    errdefs.IsInvalidArgument,
	} {
		w.add("c1", args("run"), runtime)
		if _, err := w.Create(ctx, CreateRequest{ID: "c1"}); !is(err) {
			t.Errorf("runtime %q: %v", runtime, err)
		}
		w.add("c1", args("run"), shims.DefaultRuntime)
		if _, err := w.Create(ctx, CreateRequest{ID: "c1", RuntimePath: runtime}); !is(err) {
			t.Errorf("runtime path %q: %v", runtime, err)
		}
	}
	w.clean()
}

func TestConcurrentCreate(t *testing.T) {
	w := fakes(t)
	w.add("c1", args("run"), shims.DefaultRuntime)
	w.fault("c1", shimfake.Faults{"Create": {Delay: 50 * time.Millisecond}})
	var mu sync.Mutex
	won := 0
	var wg sync.WaitGroup
	for range 10 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, err := w.Create(in("ns"), CreateRequest{ID: "c1"})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errdefs.IsAlreadyExists(err) {
				t.Errorf("create: %v", err)
			}
		}()
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d won", won)
	}
	// The same id in another namespace is another task.
	if _, err := w.Create(in("other"), CreateRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
	if _, err := w.Delete(in("other"), "c1"); err != nil {
		t.Error(err)
	}
}

// TestLeftover: a bundle that nobody keeps does not stand in the way of the next task; one whose container lives does.
func TestLeftover(t *testing.T) {
	w := fakes(t)
	w.add("c1", args("run"), shims.DefaultRuntime)
	if _, err := w.bundles.Create("ns", "c1", []byte("{}")); err != nil {
		t.Fatal(err)
	}
	w.run("c1", args("run"))

	b, err := w.bundles.Create("ns", "c2", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	shim, err := w.shims.Spawn(in("ns"), b, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer shim.Close()
	w.run("c2", args("run")) // there was a shim that kept nothing

	st, err := w.Service.Get(in("ns"), "c2", "")
	if err != nil || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("%v, %v", st, err)
	}
	// A living task that this daemon lost sight of.
	w.Service.mu.Lock()
	lostTask := w.tasks[key{"ns", "c2"}]
	delete(w.tasks, key{"ns", "c2"})
	w.Service.mu.Unlock()
	if _, err := w.Create(in("ns"), CreateRequest{ID: "c2"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create over a living task: %v", err)
	}
	w.Service.mu.Lock()
	w.tasks[key{"ns", "c2"}] = lostTask
	w.Service.mu.Unlock()
	if st, err := w.Service.Get(in("ns"), "c2", ""); err != nil || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("it was touched: %v, %v", st, err)
	}
}
