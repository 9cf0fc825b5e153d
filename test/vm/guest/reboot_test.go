//go:build vmguest

package guest

import (
	"strings"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/test/image"
)

// testReboot: managerd is there, for it was enabled. What ran before does not, and that is what it says; containers,
// images and snapshots are what they were, and the container starts again.
func testReboot(t *testing.T) {
	until(t, "systemd has started managerd by itself", func() bool { return active(t) })
	c := newClient(t)
	if tasks := call(c, c.tasks.List, &tasksapi.ListTasksRequest{}).Tasks; len(tasks) != 0 {
		t.Errorf("tasks after a boot: %v", tasks)
	}
	ctx, cancel := limited()
	defer cancel()
	if _, err := c.tasks.Get(ctx, &tasksapi.GetRequest{ContainerID: "kept"}); status.Code(err) != codes.NotFound {
		t.Errorf("the task that ran before: %v", err)
	}
	if out := command(t, "ctr", "tasks", "ls", "-q"); strings.TrimSpace(out) != "" {
		t.Errorf("ctr tasks ls: %s", out)
	}
	if all := call(c, c.containers.List, &containersapi.ListContainersRequest{}).Containers; len(all) != 1 || all[0].ID != "kept" {
		t.Errorf("containers after a boot: %v", all)
	}
	equal(t, "ctr images ls", strings.TrimSpace(command(t, "ctr", "images", "ls", "-q")), image.Default)
	command(t, "ctr", "content", "ls")

	c.start("kept")
	equal(t, "what it had written", c.exec("kept", "grep -q before /kept"), 0)
	c.finish("kept")
	command(t, "ctr", "run", "--rm", image.Default, "fresh", "true")
}
