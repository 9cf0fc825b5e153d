package engine

import (
	"fmt"
	"maps"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Update changes the limits that r names, and leaves all others as they are. InvalidArgument names what an update
// cannot change.
func (c *Container) Update(r *specs.LinuxResources) error {
	if r == nil {
		return fmt.Errorf("cannot update container %s: no resources given: %w", c.id, errdefs.ErrInvalidArgument)
	}
	lc, err := c.load()
	if err != nil {
		return err
	}
	config := lc.Config()
	if config.Cgroups == nil || config.Cgroups.Resources == nil {
		return fmt.Errorf("cannot update container %s: it has no cgroup: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	cg, res := *config.Cgroups, *config.Cgroups.Resources
	if err := updatable(r, res.Devices); err != nil {
		return fmt.Errorf("cannot update container %s: %w", c.id, err)
	}
	had := res
	merge(&res, r)
	res.SkipDevices = true
	cg.Resources = &res
	config.Cgroups = &cg
	if err := c.set(lc, config, &had, r); err != nil {
		return fmt.Errorf("cannot update container %s: %w", c.id, err)
	}
	return nil
}

// set writes the limits of config, of which had stood there before and r was asked for. The kernel takes no shares for a
// cgroup that is idle, and gives it the usual ones when it no longer is; libcontainer would write both at once.
func (c *Container) set(lc *libcontainer.Container, config configs.Config, had *cgroups.Resources, r *specs.LinuxResources) error {
	res := config.Cgroups.Resources
	was, is := idle(had), idle(res)
	shares, weight := res.CpuShares, res.CpuWeight
	if was || is && cgroups.IsCgroup2UnifiedMode() {
		if is && r.CPU != nil && r.CPU.Shares != nil {
			return invalid("linux.resources.cpu.shares: an idle cgroup has none")
		}
		res.CpuShares, res.CpuWeight = 0, 0
	}
	if err := lc.Set(config); err != nil {
		return err
	}
	if was && !is && shares != 0 {
		res.CpuShares, res.CpuWeight = shares, weight
		if err := lc.Set(config); err != nil {
			return err
		}
	}
	if had.OomKillDisable && !res.OomKillDisable { // which libcontainer leaves as it was
		state, err := lc.State()
		if err != nil {
			return err
		}
		return cgroups.WriteFile(state.CgroupPaths["memory"], "memory.oom_control", "0")
	}
	return nil
}

func idle(r *cgroups.Resources) bool { return r.CPUIdle != nil && *r.CPUIdle == 1 }

// updatable refuses what an update would leave as it is. Kubernetes sends the device rules of the create again.
func updatable(r *specs.LinuxResources, have []*devices.Rule) error {
	for i, d := range r.Devices {
		if i >= len(have) || !sameRule(d, have[i]) {
			return invalid("linux.resources.devices[%d] is not what the container was created with: device rules cannot be changed", i)
		}
	}
	return resourcesHonoured(r)
}

func sameRule(d specs.LinuxDeviceCgroup, have *devices.Rule) bool {
	number := func(n *int64) int64 {
		if n == nil {
			return devices.Wildcard
		}
		return *n
	}
	typ := devices.WildcardDevice
	if d.Type != "" {
		typ = devices.Type(d.Type[0])
	}
	return have.Type == typ && have.Major == number(d.Major) && have.Minor == number(d.Minor) &&
		have.Permissions == devices.Permissions(d.Access) && have.Allow == d.Allow
}

// merge copies into dst what src sets.
func merge(dst *cgroups.Resources, src *specs.LinuxResources) {
	if m := src.Memory; m != nil {
		set(&dst.Memory, m.Limit)
		set(&dst.MemoryReservation, m.Reservation)
		set(&dst.MemorySwap, m.Swap)
		if m.Swappiness != nil {
			dst.MemorySwappiness = m.Swappiness
		}
		set(&dst.OomKillDisable, m.DisableOOMKiller)
		set(&dst.MemoryCheckBeforeUpdate, m.CheckBeforeUpdate)
	}
	if p := src.CPU; p != nil {
		if p.Shares != nil {
			dst.CpuShares = *p.Shares
			dst.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*p.Shares)
		}
		set(&dst.CpuQuota, p.Quota)
		set(&dst.CpuPeriod, p.Period)
		set(&dst.CpuRtRuntime, p.RealtimeRuntime)
		set(&dst.CpuRtPeriod, p.RealtimePeriod)
		if p.Burst != nil {
			dst.CpuBurst = p.Burst
		}
		if p.Idle != nil {
			dst.CPUIdle = p.Idle
		}
		if p.Cpus != "" {
			dst.CpusetCpus = p.Cpus
		}
		if p.Mems != "" {
			dst.CpusetMems = p.Mems
		}
	}
	if src.Pids != nil && src.Pids.Limit != nil {
		dst.PidsLimit = src.Pids.Limit
	}
	if b := src.BlockIO; b != nil {
		set(&dst.BlkioWeight, b.Weight)
		set(&dst.BlkioLeafWeight, b.LeafWeight)
		for _, d := range b.WeightDevice {
			wd := cgroups.NewWeightDevice(d.Major, d.Minor, 0, 0)
			set(&wd.Weight, d.Weight)
			set(&wd.LeafWeight, d.LeafWeight)
			dst.BlkioWeightDevice = append(dst.BlkioWeightDevice, wd)
		}
		throttle(&dst.BlkioThrottleReadBpsDevice, b.ThrottleReadBpsDevice)
		throttle(&dst.BlkioThrottleWriteBpsDevice, b.ThrottleWriteBpsDevice)
		throttle(&dst.BlkioThrottleReadIOPSDevice, b.ThrottleReadIOPSDevice)
		throttle(&dst.BlkioThrottleWriteIOPSDevice, b.ThrottleWriteIOPSDevice)
	}
	for _, h := range src.HugepageLimits {
		dst.HugetlbLimit = append(dst.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	if n := src.Network; n != nil {
		set(&dst.NetClsClassid, n.ClassID)
		for _, p := range n.Priorities {
			dst.NetPrioIfpriomap = append(dst.NetPrioIfpriomap, &cgroups.IfPrioMap{Interface: p.Name, Priority: int64(p.Priority)})
		}
	}
	if len(src.Rdma) > 0 {
		dst.Rdma = maps.Clone(dst.Rdma)
		if dst.Rdma == nil {
			dst.Rdma = map[string]cgroups.LinuxRdma{}
		}
		for device, r := range src.Rdma {
			dst.Rdma[device] = cgroups.LinuxRdma{HcaHandles: r.HcaHandles, HcaObjects: r.HcaObjects}
		}
	}
	for k, v := range src.Unified {
		m := map[string]string{}
		for ok, ov := range dst.Unified {
			m[ok] = ov
		}
		m[k] = v
		dst.Unified = m
	}
}

func set[T any](dst *T, src *T) {
	if src != nil {
		*dst = *src
	}
}

func throttle(dst *[]*cgroups.ThrottleDevice, src []specs.LinuxThrottleDevice) {
	for _, d := range src {
		*dst = append(*dst, cgroups.NewThrottleDevice(d.Major, d.Minor, d.Rate))
	}
}
