package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	opencgroups "github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// limitRow is a limit, and what then stands in the container's cgroup: "CONTROLLER/FILE=CONTENT" on v1, "FILE=CONTENT" on
// v2, more after "; ", other names of the file after "|". A "!" begins what the error names where the limit is refused.
// Where v1 lacks the controller, the error has to name that.
type limitRow struct {
	field   string
	set     func(*specs.LinuxResources)
	v1, v2  string
	systemd string // on v2 by the systemd driver, if that differs
}

func memory(set func(*specs.LinuxMemory)) func(*specs.LinuxResources) {
	return func(r *specs.LinuxResources) { r.Memory = &specs.LinuxMemory{}; set(r.Memory) }
}

func cpu(set func(*specs.LinuxCPU)) func(*specs.LinuxResources) {
	return func(r *specs.LinuxResources) { r.CPU = &specs.LinuxCPU{}; set(r.CPU) }
}

func blockIO(set func(*specs.LinuxBlockIO)) func(*specs.LinuxResources) {
	return func(r *specs.LinuxResources) { r.BlockIO = &specs.LinuxBlockIO{}; set(r.BlockIO) }
}

// disk is a disk of this machine.
var disk, diskName = func() (d specs.LinuxBlockIODevice, name string) {
	for _, candidate := range []string{"vda", "sda", "nvme0n1", "loop0"} {
		if data, err := os.ReadFile("/sys/block/" + candidate + "/dev"); err == nil {
			_, _ = fmt.Sscanf(string(data), "%d:%d", &d.Major, &d.Minor)
			return d, strings.TrimSpace(string(data))
		}
	}
	return d, ""
}()

func throttled(rate uint64) []specs.LinuxThrottleDevice {
	return []specs.LinuxThrottleDevice{{LinuxBlockIODevice: disk, Rate: rate}}
}

const mib = 1 << 20

var limitRows = []limitRow{
	{"linux.resources.memory.limit", memory(func(m *specs.LinuxMemory) { m.Limit = number[int64](64 * mib) }),
		"memory/memory.limit_in_bytes=67108864", "memory.max=67108864", ""},
	{"linux.resources.memory.limit none", memory(func(m *specs.LinuxMemory) { m.Limit = number[int64](-1) }),
		"memory/memory.limit_in_bytes=9223372036854771712", "memory.max=max", ""},
	{"linux.resources.memory.reservation", memory(func(m *specs.LinuxMemory) { m.Reservation = number[int64](32 * mib) }),
		"memory/memory.soft_limit_in_bytes=33554432", "memory.low=33554432", ""},
	{"linux.resources.memory.swap", memory(func(m *specs.LinuxMemory) {
		m.Limit, m.Swap = number[int64](64*mib), number[int64](96*mib)
	}), "memory/memory.memsw.limit_in_bytes=100663296", "memory.swap.max=33554432", ""},
	{"linux.resources.memory.kernel", memory(func(m *specs.LinuxMemory) {
		m.Kernel = number[int64](mib) //lint:ignore SA1019 a client may set it all the same
	}), "!linux.resources.memory.kernel", "!linux.resources.memory.kernel", ""},
	{"linux.resources.memory.kernelTCP", memory(func(m *specs.LinuxMemory) { m.KernelTCP = number[int64](mib) }),
		"!linux.resources.memory.kernelTCP", "!linux.resources.memory.kernelTCP", ""},
	{"linux.resources.memory.swappiness", memory(func(m *specs.LinuxMemory) { m.Swappiness = number[uint64](10) }),
		"memory/memory.swappiness=10", "!linux.resources.memory.swappiness", ""},
	{"linux.resources.memory.disableOOMKiller", memory(func(m *specs.LinuxMemory) { m.DisableOOMKiller = number(true) }),
		"memory/memory.oom_control=oom_kill_disable 1", "!linux.resources.memory.disableOOMKiller", ""},
	{"linux.resources.memory.disableOOMKiller false", memory(func(m *specs.LinuxMemory) { m.DisableOOMKiller = number(false) }),
		"memory/memory.oom_control=oom_kill_disable 0", "memory.oom.group=0", ""},
	{"linux.resources.memory.useHierarchy", memory(func(m *specs.LinuxMemory) { m.UseHierarchy = number(true) }),
		"memory/memory.use_hierarchy=1", "memory.oom.group=0", ""},
	{"linux.resources.memory.useHierarchy false", memory(func(m *specs.LinuxMemory) { m.UseHierarchy = number(false) }),
		"!linux.resources.memory.useHierarchy", "!linux.resources.memory.useHierarchy", ""},
	{"linux.resources.cpu.shares", cpu(func(c *specs.LinuxCPU) { c.Shares = number[uint64](512) }),
		"cpu/cpu.shares=512", fmt.Sprintf("cpu.weight=%d", opencgroups.ConvertCPUSharesToCgroupV2Value(512)), ""},
	{"linux.resources.cpu.{quota,period}", cpu(func(c *specs.LinuxCPU) { c.Quota, c.Period = number[int64](50000), number[uint64](200000) }),
		"cpu/cpu.cfs_quota_us=50000; cpu/cpu.cfs_period_us=200000", "cpu.max=50000 200000", ""},
	{"linux.resources.cpu.burst", cpu(func(c *specs.LinuxCPU) { c.Quota, c.Burst = number[int64](50000), number[uint64](10000) }),
		"cpu/cpu.cfs_burst_us=10000", "cpu.max.burst=10000", ""},
	{"linux.resources.cpu.idle", cpu(func(c *specs.LinuxCPU) { c.Idle = number[int64](1) }), "cpu/cpu.idle=1", "cpu.idle=1", ""},
	{"linux.resources.cpu.idle no longer, with shares", cpu(func(c *specs.LinuxCPU) { c.Idle, c.Shares = number[int64](0), number[uint64](256) }),
		"cpu/cpu.idle=0; cpu/cpu.shares=256", fmt.Sprintf("cpu.idle=0; cpu.weight=%d", opencgroups.ConvertCPUSharesToCgroupV2Value(256)), ""},
	{"linux.resources.cpu.{realtimeRuntime,realtimePeriod}", cpu(func(c *specs.LinuxCPU) {
		c.RealtimeRuntime, c.RealtimePeriod = number[int64](1000), number[uint64](500000)
	}), "cpu/cpu.rt_runtime_us=1000; cpu/cpu.rt_period_us=500000", "!linux.resources.cpu.realtimeRuntime", ""},
	{"linux.resources.cpu.{cpus,mems}", cpu(func(c *specs.LinuxCPU) { c.Cpus, c.Mems = "0", "0" }),
		"cpuset/cpuset.cpus=0; cpuset/cpuset.mems=0", "cpuset.cpus=0; cpuset.mems=0", ""},
	{"linux.resources.pids.limit", func(r *specs.LinuxResources) { r.Pids = &specs.LinuxPids{Limit: number[int64](50)} },
		"pids/pids.max=50", "pids.max=50", ""},
	{"linux.resources.pids.limit none", func(r *specs.LinuxResources) { r.Pids = &specs.LinuxPids{Limit: number[int64](-1)} },
		"pids/pids.max=max", "pids.max=max", ""},
	{"linux.resources.blockIO.weight", blockIO(func(b *specs.LinuxBlockIO) { b.Weight = number[uint16](500) }),
		"blkio/blkio.bfq.weight|blkio.weight=500", "io.weight|io.bfq.weight=default 4950", ""},
	{"linux.resources.blockIO.leafWeight", blockIO(func(b *specs.LinuxBlockIO) { b.LeafWeight = number[uint16](500) }),
		"!blkio.leaf_weight", "!linux.resources.blockIO.leafWeight", ""},
	{"linux.resources.blockIO.weightDevice.{major,minor,weight} of a disk without BFQ", blockIO(func(b *specs.LinuxBlockIO) {
		b.WeightDevice = []specs.LinuxWeightDevice{{LinuxBlockIODevice: disk, Weight: number[uint16](500)}}
	}), "!weight_device", "!linux.resources.blockIO.weightDevice", ""},
	{"linux.resources.blockIO.weightDevice.leafWeight", blockIO(func(b *specs.LinuxBlockIO) {
		b.WeightDevice = []specs.LinuxWeightDevice{{LinuxBlockIODevice: disk, LeafWeight: number[uint16](500)}}
	}), "!blkio.leaf_weight_device", "!linux.resources.blockIO.weightDevice.leafWeight", ""},
	{"linux.resources.blockIO.throttleReadBpsDevice.{major,minor,rate}", blockIO(func(b *specs.LinuxBlockIO) { b.ThrottleReadBpsDevice = throttled(mib) }),
		"blkio/blkio.throttle.read_bps_device=" + diskName + " 1048576", "io.max=" + diskName + " rbps=1048576 wbps=max riops=max wiops=max", ""},
	{"linux.resources.blockIO.throttleWriteBpsDevice.{major,minor,rate}", blockIO(func(b *specs.LinuxBlockIO) { b.ThrottleWriteBpsDevice = throttled(mib) }),
		"blkio/blkio.throttle.write_bps_device=" + diskName + " 1048576", "io.max=" + diskName + " rbps=max wbps=1048576 riops=max wiops=max", ""},
	{"linux.resources.blockIO.throttleReadIOPSDevice.{major,minor,rate}", blockIO(func(b *specs.LinuxBlockIO) { b.ThrottleReadIOPSDevice = throttled(99) }),
		"blkio/blkio.throttle.read_iops_device=" + diskName + " 99", "io.max=" + diskName + " rbps=max wbps=max riops=99 wiops=max", ""},
	{"linux.resources.blockIO.throttleWriteIOPSDevice.{major,minor,rate}", blockIO(func(b *specs.LinuxBlockIO) { b.ThrottleWriteIOPSDevice = throttled(99) }),
		"blkio/blkio.throttle.write_iops_device=" + diskName + " 99", "io.max=" + diskName + " rbps=max wbps=max riops=max wiops=99", ""},
	{"linux.resources.hugepageLimits.{pageSize,limit}", func(r *specs.LinuxResources) {
		r.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 * mib}}
	}, "hugetlb/hugetlb.2MB.limit_in_bytes=4194304", "hugetlb.2MB.max=4194304", ""},
	{"linux.resources.network.classID", func(r *specs.LinuxResources) { r.Network = &specs.LinuxNetwork{ClassID: number[uint32](0x10001)} },
		"net_cls/net_cls.classid=65537", "!linux.resources.network.classID", ""},
	{"linux.resources.network.priorities.{name,priority}", func(r *specs.LinuxResources) {
		r.Network = &specs.LinuxNetwork{Priorities: []specs.LinuxInterfacePriority{{Name: "lo", Priority: 3}}}
	}, "net_prio/net_prio.ifpriomap=lo 3", "!linux.resources.network.priorities", ""},
	{"linux.resources.rdma.{hcaHandles,hcaObjects} of a device that there is not", func(r *specs.LinuxResources) {
		r.Rdma = map[string]specs.LinuxRdma{"mlx5_1": {HcaHandles: number[uint32](3), HcaObjects: number[uint32](10)}}
	}, "!rdma", "!rdma", ""}, // no machine of ours has one
	{"linux.resources.unified", func(r *specs.LinuxResources) {
		r.Unified = map[string]string{"memory.high": "67108864", "cgroup.max.depth": "5"}
	},
		"!unified", "memory.high=67108864; cgroup.max.depth=5", ""},
	{"linux.resources.unified unknown", func(r *specs.LinuxResources) { r.Unified = map[string]string{"nonsense.max": "1"} },
		"!unified", "!nonsense", ""},
}

// driver is a way to make cgroups.
type driver struct {
	name    string
	systemd bool
}

// drivers are those that this machine has.
func drivers() []driver {
	all := []driver{{"cgroupfs", false}}
	if exists("/run/systemd/system") {
		all = append(all, driver{"systemd", true})
	}
	return all
}

// with makes the fixture's containers by a driver of cgroups.
func (f *fixture) with(d driver) {
	f.Engine = New(Config{Root: f.root, Reaper: reap, SystemdCgroup: d.systemd})
}

// place gives a container a cgroup of its own under a driver.
func (d driver) place(s *specs.Spec, id string) {
	if d.systemd {
		s.Linux.CgroupsPath = fmt.Sprintf("system.slice:engine-test-%d:%s", os.Getpid(), id)
	}
}

// cgroupDirs are the directories of a process's cgroup: by controller on v1, and under the empty name on v2.
func cgroupDirs(t *testing.T, pid int) map[string]string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	dirs := map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		f := strings.SplitN(line, ":", 3)
		for _, controller := range strings.Split(f[1], ",") {
			dirs[controller] = filepath.Join("/sys/fs/cgroup", controller, f[2])
		}
	}
	return dirs
}

// limitContent reads one file of a container's cgroup, by the first of its names that is there.
func limitContent(t *testing.T, dirs map[string]string, file string) string {
	t.Helper()
	controller := ""
	if c, rest, ok := strings.Cut(file, "/"); ok {
		controller, file = c, rest
	}
	for _, name := range strings.Split(file, "|") {
		data, err := os.ReadFile(filepath.Join(dirs[controller], name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	t.Fatalf("%s has no %s", dirs[controller], file)
	return ""
}

// TestLimits: each limit is in the container's cgroup at create, after an update too, or refused by its name.
func TestLimits(t *testing.T) {
	unified := opencgroups.IsCgroup2UnifiedMode()
	for _, d := range drivers() {
		f := newFixture(t)
		f.with(d)
		updated := f.create(t, IO{}, func(s *specs.Spec) { d.place(s, fmt.Sprint("c", f.n)) }, "true")
		for _, row := range limitRows {
			t.Run(d.name+"/"+row.field, func(t *testing.T) {
				want := row.v1
				if unified {
					want = row.v2
					if d.systemd && row.systemd != "" {
						want = row.systemd
					}
				} else if controller, _, ok := strings.Cut(row.v1, "/"); ok && !exists("/sys/fs/cgroup/"+controller) {
					want = "!" + controller
				}
				res := &specs.LinuxResources{}
				row.set(res)
				limit := func(s *specs.Spec) {
					d.place(s, fmt.Sprint("c", f.n))
					if strings.Contains(row.field, "realtime") { // of which a parent has to have some
						s.Linux.CgroupsPath = fmt.Sprint(cgroupParent, "-rt-", f.n)
					}
					s.Linux.Resources = res
				}
				if says, ok := strings.CutPrefix(want, "!"); ok {
					f.refused(t, limit, says)
					return
				}
				check := func(when string, c *Container) {
					t.Helper()
					dirs := cgroupDirs(t, c.Init().Pid())
					for _, w := range strings.Split(want, "; ") {
						file, content, _ := strings.Cut(w, "=")
						if got := limitContent(t, dirs, file); !hasLine(got, content) {
							t.Errorf("%s %s is %q, want %q", when, file, got, content)
						}
					}
				}
				check("at create", f.create(t, IO{}, limit, "true"))
				c := updated
				// Some depend on the parent, and a line of io.max keeps what other rows have set.
				if strings.Contains(row.field, "realtime") || strings.Contains(row.field, "throttle") {
					c = f.create(t, IO{}, func(s *specs.Spec) {
						limit(s)
						s.Linux.Resources = nil
					}, "true")
				}
				if err := c.Update(res); err != nil {
					t.Fatal(err)
				}
				check("after an update", c)
			})
		}
	}
}

// hasLine says whether text has a line.
func hasLine(text, line string) bool {
	return strings.Contains("\n"+text+"\n", "\n"+line+"\n")
}

// TestUpdateRefused: an update says what it cannot change, as a create does.
func TestUpdateRefused(t *testing.T) {
	f := newFixture(t)
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}, {Allow: true, Type: "c", Major: number[int64](1), Access: "rw"}}
	c := f.create(t, IO{}, func(s *specs.Spec) { s.Linux.Resources = &specs.LinuxResources{Devices: rules} }, "true")
	if err := c.Update(&specs.LinuxResources{Devices: rules, Pids: &specs.LinuxPids{Limit: number[int64](9)}}); err != nil {
		t.Errorf("with the rules that it has: %v", err)
	}
	for field, res := range map[string]*specs.LinuxResources{
		"linux.resources.devices[0]": {Devices: rules[1:]},
		"linux.resources.devices[1]": {Devices: []specs.LinuxDeviceCgroup{rules[0], {Allow: true, Type: "b", Access: "r"}}},
		//lint:ignore SA1019 a client may set it all the same
		"linux.resources.memory.kernel": {Memory: &specs.LinuxMemory{Kernel: number[int64](mib)}},
	} {
		if err := c.Update(res); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: error is %v", field, err)
		}
	}
}

// TestUpdateIdle: what is idle stays so through updates of other limits, and takes no shares.
func TestUpdateIdle(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: number[uint64](512)}}
	}, "true")
	for _, r := range []*specs.LinuxResources{
		{CPU: &specs.LinuxCPU{Idle: number[int64](1)}}, {Pids: &specs.LinuxPids{Limit: number[int64](9)}},
	} {
		if err := c.Update(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: number[uint64](256)}}); err == nil || !strings.Contains(err.Error(), "linux.resources.cpu.shares") {
		t.Errorf("shares of an idle cgroup: %v", err)
	}
	dirs := cgroupDirs(t, c.Init().Pid())
	file := "cpu/cpu.idle"
	if opencgroups.IsCgroup2UnifiedMode() {
		file = "cpu.idle"
	}
	if got := limitContent(t, dirs, file); got != "1" {
		t.Errorf("%s is %s", file, got)
	}
}

// TestCheckBeforeUpdate: a limit below what is in use is refused, and the container lives on.
func TestCheckBeforeUpdate(t *testing.T) {
	f := newFixture(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	c := f.create(t, IO{Stdout: w}, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"})
	}, "sh", "-c", "dd if=/dev/zero of=/tmp/x bs=1M count=32 2>/dev/null; echo full; sleep 1000")
	_ = w.Close()
	start(t, c)
	if n, err := r.Read(make([]byte, 8)); n == 0 {
		t.Fatal(err)
	}
	if err := c.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: number[int64](8 * mib), CheckBeforeUpdate: number(true)}}); err == nil {
		t.Error("it is accepted")
	}
	select {
	case <-c.Init().Done():
		t.Errorf("it ended: %+v", c.Init().Exit())
	default:
	}
}

// TestDeviceRules: each rule lets in and keeps out, the last that fits decides, and what every container has stays. A
// device that there is not tells the two apart: who may use it is told so, who may not is not.
func TestDeviceRules(t *testing.T) {
	const char, block = "c 1 12", "b 250 99"
	c1 := func(allow bool, typ string, major, minor int64, access string) specs.LinuxDeviceCgroup {
		d := specs.LinuxDeviceCgroup{Allow: allow, Type: typ, Access: access}
		if major >= 0 {
			d.Major = &major
		}
		if minor >= 0 {
			d.Minor = &minor
		}
		return d
	}
	none := specs.LinuxDeviceCgroup{Allow: false, Access: "rwm"}
	for _, d := range drivers() {
		f := newFixture(t)
		f.with(d)
		for _, row := range []struct {
			name  string
			rules []specs.LinuxDeviceCgroup
			want  string // for reading and writing: the character device, the block device, and /dev/null
		}{
			{"none", []specs.LinuxDeviceCgroup{none}, "no no no no yes yes"},
			{"all", []specs.LinuxDeviceCgroup{c1(true, "a", -1, -1, "rwm")}, "yes yes yes yes yes yes"},
			{"all of no type", []specs.LinuxDeviceCgroup{none, c1(true, "", -1, -1, "rwm")}, "yes yes yes yes yes yes"},
			{"one", []specs.LinuxDeviceCgroup{none, c1(true, "c", 1, 12, "rw")}, "yes yes no no yes yes"},
			{"others", []specs.LinuxDeviceCgroup{none, c1(true, "c", 1, 13, "rwm"), c1(true, "b", 1, 12, "rwm")}, "no no no no yes yes"},
			{"major", []specs.LinuxDeviceCgroup{none, c1(true, "b", 250, -1, "rw")}, "no no yes yes yes yes"},
			{"type", []specs.LinuxDeviceCgroup{none, c1(true, "c", -1, -1, "rw")}, "yes yes no no yes yes"},
			{"reading and writing", []specs.LinuxDeviceCgroup{none, c1(true, "c", 1, 12, "r"), c1(true, "b", 250, 99, "w")}, "yes no no yes yes yes"},
			{"taken back", []specs.LinuxDeviceCgroup{none, c1(true, "c", 1, 12, "rw"), c1(false, "c", 1, 12, "w")}, "yes no no no yes yes"},
		} {
			t.Run(d.name+"/"+row.name, func(t *testing.T) {
				got := f.runShell(t, func(s *specs.Spec) {
					d.place(s, fmt.Sprint("c", f.n))
					s.Linux.Resources = &specs.LinuxResources{Devices: row.rules}
				}, "rm -f /tmp/d*; mknod /tmp/d1 "+char+"; mknod /tmp/d2 "+block+"; mknod /tmp/d3 c 1 3; for d in 1 2 3; do for x in '<' '>'; do "+
					"case $(eval true $x/tmp/d$d 2>&1) in *permitted*) echo no ;; ''|*'No such device'*) echo yes ;; *) eval true $x/tmp/d$d ;; esac; done; done | xargs echo")
				if got != row.want {
					t.Errorf("got %q, want %q", got, row.want)
				}
			})
		}
		t.Run(d.name+"/malformed", func(t *testing.T) {
			for _, rule := range []specs.LinuxDeviceCgroup{{Type: "c"}, {Type: "x", Access: "r"}} {
				f.refused(t, func(s *specs.Spec) {
					d.place(s, fmt.Sprint("c", f.n))
					s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{rule}}
				}, "device")
			}
		})
	}
}

// TestScopeDevices: the rules stand on systemd's scope too, so that they are the same after everything that makes systemd
// write its own again.
func TestScopeDevices(t *testing.T) {
	if !exists("/run/systemd/system") {
		t.Skip("this machine's first process is not systemd")
	}
	f := newFixture(t)
	d := driver{"systemd", true}
	f.with(d)
	c := f.create(t, IO{}, func(s *specs.Spec) {
		d.place(s, "scope")
		s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
			{Allow: false, Access: "rwm"}, {Allow: true, Type: "b", Major: number[int64](250), Access: "r"},
		}}
	}, "sleep", "1000")
	start(t, c)
	check := func(when string) {
		t.Helper()
		got := f.execShell(t, c, func(*specs.Process) {}, "rm -f /tmp/d*; mknod /tmp/d1 b 250 99; mknod /tmp/d2 c 1 12; cat /tmp/d1; cat /tmp/d2; cat /dev/null; true")
		if !strings.Contains(got, "/tmp/d1': No such device") || !strings.Contains(got, "/tmp/d2': Operation not permitted") || strings.Contains(got, "/dev/null") {
			t.Errorf("%s: %s", when, got)
		}
	}
	check("at first")
	unit := fmt.Sprintf("engine-test-%d-scope.scope", os.Getpid())
	shown := command(t, "systemctl", "show", "-p", "DevicePolicy", "-p", "DeviceAllow", unit)
	for _, want := range []string{"DevicePolicy=strict", "DeviceAllow=/dev/char/1:3 r"} {
		if !strings.Contains(shown, want) {
			t.Errorf("the scope has no %s: %s", want, shown)
		}
	}
	command(t, "systemctl", "daemon-reload")
	check("after daemon-reload")
	if err := c.Update(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: number[int64](99)}}); err != nil {
		t.Error(err)
	}
	command(t, "systemctl", "daemon-reload")
	check("after an update and daemon-reload")
}

// TestRealtime: a container with a share of the time for it runs under a real-time policy.
func TestRealtime(t *testing.T) {
	f := newFixture(t)
	got := f.runShell(t, func(s *specs.Spec) {
		s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedFIFO, Priority: 7}
		if !opencgroups.IsCgroup2UnifiedMode() {
			s.Linux.CgroupsPath = cgroupParent + "-rt"
			s.Linux.Resources = &specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimeRuntime: number[int64](100_000)}}
		}
	}, own+"${41} ${40}")
	if got != "1 7" {
		t.Errorf("policy and priority are %q", got)
	}
}

// TestCgroupsPath: where the container's cgroup is, is what is said, below the root in any case.
func TestCgroupsPath(t *testing.T) {
	t.Cleanup(func() {
		deep, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent + "/deep")
		for _, d := range append(deep, "/sys/fs/cgroup"+cgroupParent+"/deep") {
			_ = os.Remove(d)
		}
	})
	f := newFixture(t)
	for path, want := range map[string]string{
		cgroupParent + "/deep/er": cgroupParent + "/deep/er", cgroupParent[1:] + "/relative": cgroupParent + "/relative",
		"/../.." + cgroupParent + "/up": cgroupParent + "/up",
	} {
		c := f.create(t, IO{}, func(s *specs.Spec) { s.Linux.CgroupsPath = path }, "true")
		for controller, dir := range cgroupDirs(t, c.Init().Pid()) {
			if controller == "" && !opencgroups.IsCgroup2UnifiedMode() {
				continue // the hierarchy of v2 beside those of v1 has no limits
			}
			if !strings.HasSuffix(dir, want) {
				t.Errorf("%s: the cgroup is %s", path, dir)
			}
		}
	}
	if exists("/run/systemd/system") {
		f.with(driver{systemd: true})
		f.refused(t, func(s *specs.Spec) { s.Linux.CgroupsPath = "/not/three/parts" }, "cgroupsPath")
	}
}
