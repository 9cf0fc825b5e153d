//go:build vmguest

package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestWeightDevice: a weight for a disk that BFQ schedules is in the container's cgroup, at create and after an update.
func TestWeightDevice(t *testing.T) {
	block, err := filepath.EvalSymlinks("/sys/dev/block/" + diskName)
	if err != nil {
		t.Fatal(err)
	}
	scheduler := filepath.Join(block, "queue/scheduler")
	data, err := os.ReadFile(scheduler)
	if err != nil {
		t.Fatal(err)
	}
	_, before, _ := strings.Cut(string(data), "[")
	before, _, _ = strings.Cut(before, "]")
	schedule := func(name string) {
		t.Helper()
		if err := os.WriteFile(scheduler, []byte(name), 0); err != nil {
			t.Fatal(err)
		}
	}
	command(t, "modprobe", "bfq")
	t.Cleanup(func() { command(t, "modprobe", "-r", "bfq") }) // with it, other weights are BFQ's too
	schedule("bfq")
	t.Cleanup(func() { schedule(before) })

	for _, d := range drivers() {
		t.Run(d.name, func(t *testing.T) {
			f := newFixture(t)
			f.with(d)
			weight := func(w uint16) *specs.LinuxResources {
				return &specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{WeightDevice: []specs.LinuxWeightDevice{{LinuxBlockIODevice: disk, Weight: &w}}}}
			}
			c := f.create(t, IO{}, func(s *specs.Spec) {
				d.place(s, fmt.Sprint("c", f.n))
				s.Linux.Resources = weight(500)
			}, "true")
			check := func(when, want string) {
				t.Helper()
				if got := limitContent(t, cgroupDirs(t, c.Init().Pid()), "io.bfq.weight"); !hasLine(got, want) {
					t.Errorf("%s io.bfq.weight is %q, want %q", when, got, want)
				}
			}
			check("at create", diskName+" 500")
			if err := c.Update(weight(300)); err != nil {
				t.Fatal(err)
			}
			check("after an update", diskName+" 300")
		})
	}
}

// TestShown: this kernel has, of what not every kernel has, what the table in the documentation takes for shown here.
func TestShown(t *testing.T) {
	for field, u := range unless {
		if u.has() != u.vm {
			t.Errorf("%s: this kernel's %s: %v, the table says %v", field, u.kernel, u.has(), u.vm)
		}
	}
}
