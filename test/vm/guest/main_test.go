//go:build vmguest

package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"

	"github.com/managerd/managerd/test/image"
)

// work is where the host put the trees that install.sh installs from: two builds that differ in their version.
const work = "/vmtest/work"

// part is one of the tests that share the machine, in order.
type part struct {
	name string
	fn   func(*testing.T)
}

// TestFirstBoot begins with a machine that knows nothing of managerd, and ends with a container that runs.
func TestFirstBoot(t *testing.T) {
	runParts(t, []part{
		{"Install", testInstall},
		{"Import", testImport},
		{"Checkpoint", testCheckpoint},
		{"Drivers", testDrivers},
		{"Inherited", testInherited},
		{"Steady", testSteady},
		{"Restart", testRestart},
		{"Kill", testKill},
		{"KillOften", testKillOften},
		{"BothKilled", testBothKilled},
		{"Stop", testStop},
		{"Reload", testReload},
		{"Upgrade", testUpgrade},
		{"Watchdog", testWatchdog},
		{"Kept", testKept},
	})
}

// TestSecondBoot finds the same disk, on which nobody has shut anything down.
func TestSecondBoot(t *testing.T) {
	runParts(t, []part{
		{"Reboot", testReboot},
		{"Uninstall", testUninstall},
	})
}

// runParts stops at the first part that fails: the others need what it left.
func runParts(t *testing.T, parts []part) {
	if data, _ := os.ReadFile("/proc/1/comm"); strings.TrimSpace(string(data)) != "systemd" {
		t.Fatal("systemd does not run here; make test-vm is what runs this")
	}
	for _, p := range parts {
		began := time.Now()
		ok := t.Run(p.name, p.fn)
		fmt.Printf("%s %s: %.1f s\n", t.Name(), p.name, time.Since(began).Seconds())
		if !ok {
			t.Log(try("systemctl", "status", "managerd.service", "managerd.socket"))
			return
		}
	}
}

// command runs a program that must succeed, and gives its output.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := output(name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// try runs a program, whatever comes of it.
func try(name string, args ...string) string {
	out, err := output(name, args...)
	if err != nil {
		return out + err.Error()
	}
	return out
}

func output(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if name == "ctr" { // a daemon takes seconds to start here
		args = append([]string{"--connect-timeout", "100s"}, args...)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "CONTAINERD_ADDRESS="+socket)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// property is what systemctl says of managerd.service.
func property(t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(command(t, "systemctl", "show", "-P", name, "managerd.service"))
}

// ask gives a property of managerd.service that a kind of unit has. It asks systemd itself: a program for each question of a
// loop takes longer than what the loop waits for.
func ask(t *testing.T, kind, name string) any {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), step)
	defer cancel()
	conn, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p, err := conn.GetUnitTypePropertyContext(ctx, "managerd.service", kind, name)
	if err != nil {
		t.Fatal(err)
	}
	return p.Value.Value()
}

func active(t *testing.T) bool {
	t.Helper()
	return ask(t, "Unit", "ActiveState") == "active"
}

func number(t *testing.T, name string) int {
	t.Helper()
	n, ok := ask(t, "Service", name).(uint32)
	if !ok {
		t.Fatalf("%s is no number", name)
	}
	return int(n)
}

// until asks again and again, for at most two minutes, until the answer is yes.
func until(t *testing.T, what string, yes func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !yes(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func equal[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, not %v", what, got, want)
	}
}

// alive fails the test unless the process is there and is what it was: a container's script.
func alive(t *testing.T, pid int) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.HasPrefix(string(data), "/bin/sh\x00-c") {
		t.Errorf("process %d of a container: %q, %v", pid, data, err)
	}
}

// install installs one of the builds.
func install(t *testing.T, build string) {
	t.Helper()
	command(t, "sh", filepath.Join(work, build, "contrib/install.sh"), "install")
}

func testInstall(t *testing.T) {
	install(t, "this")
	command(t, "systemctl", "enable", "managerd.service") // Also=managerd.socket
	for _, unit := range []string{"managerd.service", "managerd.socket"} {
		equal(t, unit, strings.TrimSpace(command(t, "systemctl", "is-enabled", unit)), "enabled")
	}
	for name, want := range map[string]string{
		"Type": "notify", "Delegate": "yes", "KillMode": "process", "Restart": "always",
		"FileDescriptorStoreMax": "8192", "TasksMax": "infinity", "LimitNOFILE": "1048576", "OOMScoreAdjust": "-999",
		"OOMPolicy": "continue",
	} {
		equal(t, name, property(t, name), want)
	}
	if out := try("systemd-analyze", "verify", "managerd.service", "managerd.socket"); strings.Contains(out, "managerd") {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	// Only the socket is started. The first client starts the service, and waits for it.
	command(t, "systemctl", "start", "managerd.socket")
	equal(t, "before the first client", property(t, "ActiveState"), "inactive")
	command(t, "ctr", "version")
	equal(t, "after the first client", property(t, "ActiveState"), "active")
	until(t, "all of it works", func() bool { return ask(t, "Service", "StatusText") == "serving" }) // kernel modules may be loaded first
	equal(t, "the watchdog", property(t, "WatchdogUSec"), "30s")
	if out := command(t, "ctr", "plugins", "ls"); !regexp.MustCompile(`overlayfs .* ok`).MatchString(out) {
		t.Errorf("no overlayfs: %s", out)
	}
}

// testImport uses Debian's ctr, as everybody would.
func testImport(t *testing.T) {
	archive := filepath.Join(t.TempDir(), "busybox.tar")
	if err := image.Write(archive, image.Options{Compression: image.Gzip}); err != nil {
		t.Fatal(err)
	}
	command(t, "ctr", "images", "import", archive)
	command(t, "ctr", "run", "--rm", image.Default, "once", "true")
}

func testUninstall(t *testing.T) {
	command(t, "sh", filepath.Join(work, "this/contrib/install.sh"), "uninstall")
	equal(t, "the unit", property(t, "LoadState"), "not-found")
	for _, dir := range []string{"/usr/local/bin", "/usr/local/lib/systemd/system", "/etc/systemd/system/*.wants"} {
		left, err := filepath.Glob(filepath.Join(dir, "m*"))
		if err != nil {
			t.Fatal(err)
		}
		shims, err := filepath.Glob(filepath.Join(dir, "shim*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range append(left, shims...) {
			if base := filepath.Base(file); strings.HasPrefix(base, "managerd") || base == "mctl" || base == "shim-runc" {
				t.Errorf("left behind: %s", file)
			}
		}
	}
}
