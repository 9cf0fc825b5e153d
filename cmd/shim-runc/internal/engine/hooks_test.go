package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestHooks: all six are run, each at its time.
func TestHooks(t *testing.T) {
	f := newFixture(t)
	outside := filepath.Join(f.bundle, "rootfs/tmp/hooks")
	hook := func(name, file string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo " + name + " >>" + file}, Env: []string{"PATH=/bin:/usr/bin"}}}
	}
	said := func(want string) {
		t.Helper()
		data, _ := os.ReadFile(outside)
		if got := strings.Join(strings.Fields(string(data)), " "); got != want {
			t.Errorf("hooks that ran: %q, want %q", got, want)
		}
	}
	id := f.id()
	spec := testSpec(id, "sleep", "60")
	spec.Hooks = &specs.Hooks{
		//lint:ignore SA1019 old clients set it
		Prestart:        hook("prestart", outside),
		CreateRuntime:   hook("createRuntime", outside),
		CreateContainer: hook("createContainer", outside),
		StartContainer:  hook("startContainer", "/tmp/hooks"),
		Poststart:       hook("poststart", outside),
		Poststop:        hook("poststop", outside),
	}
	c, err := f.Create(context.Background(), id, f.bundle, spec, IO{})
	if err != nil {
		t.Fatal(err)
	}
	said("prestart createRuntime createContainer")
	start(t, c)
	said("prestart createRuntime createContainer startContainer poststart")
	if err := c.Signal(unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	<-c.Init().Done()
	if err := c.Destroy(); err != nil {
		t.Fatal(err)
	}
	said("prestart createRuntime createContainer startContainer poststart poststop")
}

// TestHookFields: a hook has the arguments and the environment that are its own, and is told of the container.
func TestHookFields(t *testing.T) {
	f := newFixture(t)
	out := filepath.Join(f.bundle, "told")
	c := f.create(t, IO{}, func(s *specs.Spec) {
		s.Annotations = map[string]string{"row.a": "b=c"}
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{
			Path: "/bin/sh", Args: []string{"sh", "-c", "(echo $0 $1 $A ${HOME-none}; cat) >" + out, "zero", "one"}, Env: []string{"A=2", "PATH=/bin:/usr/bin"},
		}}}
	}, "true")
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	said, told, _ := strings.Cut(string(data), "\n")
	if said != "zero one 2 none" {
		t.Errorf("arguments and environment: %q", said)
	}
	var state specs.State
	if err := json.Unmarshal([]byte(told), &state); err != nil {
		t.Fatal(err)
	}
	if state.ID != c.ID() || state.Pid != c.Init().Pid() || state.Bundle != f.bundle || state.Annotations["row.a"] != "b=c" || state.Status != specs.StateCreating {
		t.Errorf("the hook is told %+v", state)
	}
}

// TestHookTimeLimits: of each of the six points, a hook that outlasts its limit is ended soon, and so is the container that
// it keeps from being made or started. One of the end keeps nothing, and is logged.
func TestHookTimeLimits(t *testing.T) {
	f := newFixture(t)
	log := f.logged()
	limit := 1
	slow := []specs.Hook{{Path: "/bin/sleep", Args: []string{"sleep", "60"}, Env: []string{"PATH=/bin"}, Timeout: &limit}}
	for _, point := range []struct {
		name  string
		hooks specs.Hooks
		fails string // the request that does
	}{
		//lint:ignore SA1019 old clients set it
		{"prestart", specs.Hooks{Prestart: slow}, "create"}, {"createRuntime", specs.Hooks{CreateRuntime: slow}, "create"},
		{"createContainer", specs.Hooks{CreateContainer: slow}, "create"}, {"startContainer", specs.Hooks{StartContainer: slow}, "start"},
		{"poststart", specs.Hooks{Poststart: slow}, "start"}, {"poststop", specs.Hooks{Poststop: slow}, ""},
	} {
		t.Run(point.name, func(t *testing.T) {
			id := f.id()
			spec := testSpec(id, "sleep", "1000")
			spec.Hooks = &point.hooks
			begin, failed := time.Now(), ""
			c, err := f.Create(context.Background(), id, f.bundle, spec, IO{})
			if err != nil {
				failed = "create"
			} else {
				if err = c.Start(context.Background()); err != nil {
					failed = "start"
				}
				if point.fails == "" {
					_ = c.Signal(unix.SIGKILL, false)
				}
				select { // or it was ended by the hook
				case <-c.Init().Done():
				case <-time.After(30 * time.Second):
					t.Error("it runs on")
					_ = c.Signal(unix.SIGKILL, false)
					<-c.Init().Done()
				}
				if err := c.Destroy(); err != nil {
					t.Error(err)
				}
				if point.fails == "" {
					log.await(t, "hook")
				}
			}
			if took := time.Since(begin); failed != point.fails || took > 25*time.Second || took < time.Second {
				t.Errorf("after %v %q failed, want %q: %v", took, failed, point.fails, err)
			}
			if failed != "" && !strings.Contains(err.Error(), "hook") {
				t.Errorf("error is %v", err)
			}
			if exists(filepath.Join(f.root, id)) {
				t.Error("its state is left behind")
			}
		})
	}
}

// TestPoststopHooks: each runs once whatever became of the others, and each failure is in the log.
func TestPoststopHooks(t *testing.T) {
	f := newFixture(t)
	log := f.logged()
	out := filepath.Join(f.bundle, "stopped")
	var hooks []specs.Hook
	for i, status := range []int{0, 7, 0, 8, 0} {
		script := fmt.Sprintf("echo %d >>%s; exit %d", i, out, status)
		hooks = append(hooks, specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script}})
	}
	c := f.create(t, IO{}, func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: hooks} }, "true")
	start(t, c)
	c.Init().Exit()
	if err := c.Destroy(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(out)
	if got := strings.Join(strings.Fields(string(data)), " "); err != nil || got != "0 1 2 3 4" {
		t.Errorf("hooks that ran: %q, %v", got, err)
	}
	log.await(t, "exit status 7")
	log.await(t, "exit status 8")
}

// logLines is what an engine logged.
type logLines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await waits until something was logged: what an init says comes through a pipe.
func (l *logLines) await(t *testing.T, what string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(l.String(), what); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the log does not say %q:\n%s", what, l)
		}
	}
}

// logged gives the fixture an engine whose log can be read.
func (f *fixture) logged() *logLines {
	l := &logLines{}
	f.Engine = New(Config{Root: f.root, Reaper: reap, Log: slog.New(slog.NewTextHandler(l, nil))})
	return l
}

// TestUnknownCapability: one that this kernel does not have is left out, as the specification has it, and that is logged.
func TestUnknownCapability(t *testing.T) {
	f := newFixture(t)
	log := f.logged()
	caps := []string{"CAP_NET_RAW", "CAP_ROW"}
	got := f.runShell(t, func(s *specs.Spec) {
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	}, status("CapEff"))
	if got != "0000000000002000" {
		t.Errorf("capabilities are %s", got)
	}
	log.await(t, "CAP_ROW")
}
