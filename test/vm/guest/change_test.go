//go:build vmguest

package guest

import (
	"os"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/emptypb"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
)

func configure(t *testing.T, text string) {
	t.Helper()
	if err := os.MkdirAll("/etc/managerd", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/etc/managerd/config.toml", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// testReload: the configuration is read again, without another process; a wrong one fails the reload, and changes nothing.
func testReload(t *testing.T) {
	c := newClient(t)
	pid := number(t, "MainPID")
	logged := func(text string) bool {
		return strings.Contains(command(t, "journalctl", "-b", "-u", "managerd.service", "--no-pager", "-o", "cat"), text)
	}
	configure(t, "version = 3\n[debug]\nlevel = \"debug\"\n")
	command(t, "systemctl", "reload", "managerd")
	until(t, "the level has changed", func() bool { return logged("level=DEBUG") })
	until(t, "it serves again", func() bool { return active(t) })
	equal(t, "the status", property(t, "StatusText"), "serving")

	configure(t, "version = 3\n[debug]\nlevel = \"loud\"\n")
	out, err := output("systemctl", "reload", "managerd")
	if err == nil {
		t.Errorf("a reload of a wrong configuration succeeds: %s", out)
	}
	until(t, "it serves on", func() bool { return active(t) })
	if !logged("loud") {
		t.Error("the journal does not tell what is wrong")
	}
	equal(t, "an exec afterwards", c.exec("steady", "exit 31"), 31)

	configure(t, "version = 3\n")
	command(t, "systemctl", "reload", "managerd")
	until(t, "the level has changed back", func() bool { return logged("level=INFO") })
	until(t, "it serves once more", func() bool { return active(t) })
	equal(t, "the pid after three reloads", number(t, "MainPID"), pid)
}

// testUpgrade replaces the programs by another build and restarts managerd while clients call it, and goes back again.
func testUpgrade(t *testing.T) {
	c := newClient(t)
	container := pidOf(c, "steady")
	ran := func() string { return call(c, c.version.Version, &emptypb.Empty{}).Version }
	this := ran()
	for _, build := range []string{"next", "this"} {
		install(t, build)
		ended := hammer(t)
		command(t, "systemctl", "restart", "managerd")
		_, failed := ended()
		for _, err := range failed {
			t.Error(err)
		}
		want := this
		if build == "next" {
			want = "vm-next"
		}
		equal(t, "the version that runs", ran(), want)
		equal(t, "the pid of a container", pidOf(c, "steady"), container)
		equal(t, "an exec in it", c.exec("steady", "exit 33"), 33)
		// A shim of this build, which the build before, or after, is to find.
		c.run("of-"+build, trap(50), false)
	}
	for _, id := range []string{"of-next", "of-this"} {
		equal(t, "an exec in a container "+id, c.exec(id, "exit 34"), 34)
		c.finish(id)
	}
	if this == "vm-next" {
		t.Error("both builds have the same version")
	}
}

// testKept leaves a container that runs, for the next boot. The power goes without a warning.
func testKept(t *testing.T) {
	c := newClient(t)
	c.finish("steady")
	c.run("kept", "echo before >/kept; sync; "+forever, false)
	until(t, "it has written", func() bool { return c.exec("kept", "grep -q before /kept") == 0 })
	equal(t, "its state", call(c, c.tasks.Get, &tasksapi.GetRequest{ContainerID: "kept"}).Process.Status.String(), "RUNNING")
}
