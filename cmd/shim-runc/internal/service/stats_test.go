package service_test

import (
	"os"
	"testing"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestStatsNetwork: the counters of the container's interfaces are in its metrics, those of the machine are not; on cgroup v2 its
// pressure is.
func TestStatsNetwork(t *testing.T) {
	for _, own := range []bool{true, false} {
		id := "host"
		if own {
			id = "own"
		}
		f := running(t, id, func(s *specs.Spec) {
			if own {
				s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
			}
			s.Process.Capabilities = &specs.LinuxCapabilities{
				Bounding: []string{"CAP_NET_ADMIN", "CAP_NET_RAW"}, Permitted: []string{"CAP_NET_ADMIN", "CAP_NET_RAW"}, Effective: []string{"CAP_NET_ADMIN", "CAP_NET_RAW"},
			}
		})
		if own {
			if out := f.capture("traffic", "sh", "-c", "ip link set lo up && ping -c 3 -i 0.01 -s 1000 127.0.0.1 >/dev/null && echo ok"); out != "ok\n" {
				t.Fatalf("no traffic: %s", out)
			}
		}
		r, err := f.Stats(ctx, &task.StatsRequest{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		m, err := typeurl.UnmarshalAny(r.Stats)
		if err != nil {
			t.Fatal(err)
		}
		type counters struct{ rx, tx, packets uint64 }
		got := map[string]counters{}
		switch m := m.(type) {
		case *v1.Metrics:
			for _, n := range m.Network {
				got[n.Name] = counters{n.RxBytes, n.TxBytes, n.RxPackets}
			}
		case *v2.Metrics:
			for _, n := range m.Network {
				got[n.Name] = counters{n.RxBytes, n.TxBytes, n.RxPackets}
			}
			_, err := os.Stat("/proc/pressure/cpu") // the kernel counts it
			limited := m.Memory.GetUsage() > 0      // there is a memory controller
			if err == nil && (m.CPU.GetPSI().GetSome() == nil || m.Io.GetPSI().GetSome() == nil || limited && m.Memory.GetPSI().GetFull() == nil) {
				t.Errorf("no pressure: %v", m)
			}
		default:
			t.Fatalf("metrics are a %T", m)
		}
		lo, found := got["lo"]
		if found != own || own && (lo.packets < 6 || lo.rx < 6000 || lo.tx != lo.rx) {
			t.Errorf("%s: %v", id, got)
		}
	}
}
