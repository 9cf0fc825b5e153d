package engine

import (
	"context"
	"os"
	"path/filepath"
	"strings"
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

// TestHookTimeLimit: a hook that outlasts its limit ends the create, soon.
func TestHookTimeLimit(t *testing.T) {
	f := newFixture(t)
	id, limit := f.id(), 1
	spec := testSpec(id, "true")
	spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sleep", Args: []string{"sleep", "60"}, Timeout: &limit}}}
	begin := time.Now()
	c, err := f.Create(context.Background(), id, f.bundle, spec, IO{})
	if err == nil {
		_ = c.Signal(unix.SIGKILL, false)
		<-c.Init().Done()
		t.Fatalf("it is created; %v", c.Destroy())
	}
	if took := time.Since(begin); took > 20*time.Second || !strings.Contains(err.Error(), "hook") {
		t.Errorf("after %v: %v", took, err)
	}
}
