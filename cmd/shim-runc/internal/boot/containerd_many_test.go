package boot

import (
	"errors"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/managerd/managerd/test/image"
)

var (
	many   = flag.Int("containerd-many", 200, "how many containers TestContainerdMany runs; under -short a quarter of them")
	atOnce = flag.Int("containerd-at-once", 16, "how many of them at once")
)

// TestContainerdMany: many containers at once under Debian's containerd, each with an exit code of its own, and nothing left
// of them.
func TestContainerdMany(t *testing.T) {
	number := *many
	if testing.Short() {
		number /= 4
	}
	d := startContainerd(t)
	archive := filepath.Join(d.dir, "image.tar")
	if err := image.Write(archive, image.Options{Name: img}); err != nil {
		t.Fatal(err)
	}
	d.ctr("image", "import", archive)
	began := time.Now()
	var next atomic.Int64
	var workers sync.WaitGroup
	for range *atOnce {
		workers.Go(func() {
			for n := int(next.Add(1)); n <= number; n = int(next.Add(1)) {
				code := n % 120
				out, err := d.try("run", "--rm", "--runtime", binary, img, fmt.Sprint("many-", n), "sh", "-c", fmt.Sprintf("echo out %d; exit %d", n, code))
				got := 0
				var exit *exec.ExitError
				if errors.As(err, &exit) {
					got = exit.ExitCode()
				}
				if got != code || out != fmt.Sprintf("out %d\n", n) {
					t.Errorf("container %d: status %d, want %d, output %q: %v", n, got, code, out, err)
				}
			}
		})
	}
	workers.Wait()
	t.Logf("%d containers, %d at once: %.1f s", number, *atOnce, time.Since(began).Seconds())
	for _, list := range [][]string{{"task", "ls", "-q"}, {"container", "ls", "-q"}} {
		if out := d.ctr(list...); out != "" {
			t.Errorf("ctr %v: %q", list, out)
		}
	}
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left := shims(t)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("shims are left: %v", left)
		}
	}
}
