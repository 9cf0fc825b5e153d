package service

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/containerd/cgroups/v3"

	root "github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
)

// knowing is an engine that knows where a container's cgroup is.
type knowing struct {
	Engine
	found engine.Found
}

func (k knowing) Load(string, string, *reaper.Process, string) (Container, engine.Found, error) {
	return nil, k.found, nil
}

// TestOOMFoundAtExit: the cgroup could not be found when the container was made; the kills in it are told at the exit.
func TestOOMFoundAtExit(t *testing.T) {
	dir, limit, name := filepath.Join(root.Root, "memory"), "memory.limit_in_bytes", "memory"
	if cgroups.Mode() == cgroups.Unified {
		dir, limit, name = root.Root, "memory.max", ""
	}
	dir = filepath.Join(dir, fmt.Sprintf("managerd-service-test-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, limit), []byte(strconv.Itoa(32<<20)), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "echo $$ > "+dir+"/cgroup.procs && exec tail /dev/zero")
	if out, err := cmd.CombinedOutput(); err == nil || len(out) > 0 {
		t.Fatalf("%v: %s", err, out)
	}

	s, err := New(Config{
		Namespace: "test", ID: "c1", Bundle: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		NewEngine: func(engine.Config, string) (Engine, error) {
			return knowing{found: engine.Found{Cgroup: map[string]string{name: dir}}}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	s.init = &process{kind: shimapi.Init}
	s.watchCgroup(root.Load(cmd.Process.Pid)) // which has ended
	if s.cgroup != nil {
		t.Fatal("the cgroup of a process that has ended was found")
	}
	if kills := s.countOOM(false); kills != 0 {
		t.Errorf("%d kills before the exit of init", kills)
	}
	if kills := s.countOOM(true); kills != 1 {
		t.Errorf("%d kills", kills)
	}
	past, err := s.readPast()
	if err != nil || past.oomKills != 1 {
		t.Errorf("%+v, %v", past, err)
	}
}
