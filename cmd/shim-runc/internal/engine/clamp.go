package engine

import (
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Clamp lowers what only CAP_SYS_RESOURCE may raise, where we lack it: a hard rlimit above our own (setrlimit(2)), and
// an oom_score_adj below our own (proc(5)). Without it nearly every container of a client that does not know about
// the missing capability would fail. Each clamp is logged.
//
// A process that asks for no oom_score_adj gets 0 where ours is below that: a service manager protects the daemon, and so
// us, from the kernel's OOM killer, and containers that inherited it would leave the kernel nothing else to kill.
type Clamp struct {
	log *slog.Logger
	on  bool
	oom int // our oom_score_adj; without the capability, the lowest that we may set
}

// NewClamp looks what this process may raise; log hears of each clamp.
func NewClamp(log *slog.Logger) Clamp {
	c := Clamp{log: log}
	if b, err := os.ReadFile("/proc/self/oom_score_adj"); err == nil {
		c.oom, _ = strconv.Atoi(strings.TrimSpace(string(b)))
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return c
	}
	if data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return c
	}
	c.on = true
	return c
}

// Process changes p in place.
func (c Clamp) Process(p *specs.Process) {
	if p.OOMScoreAdj == nil && c.oom < 0 {
		p.OOMScoreAdj = new(int)
	}
	if !c.on {
		return
	}
	if p.OOMScoreAdj != nil && *p.OOMScoreAdj < c.oom {
		c.log.Warn("clamped oom_score_adj: raising a process's protection needs CAP_SYS_RESOURCE", "asked", *p.OOMScoreAdj, "set", c.oom)
		v := c.oom
		p.OOMScoreAdj = &v
	}
	for i := range p.Rlimits {
		r := &p.Rlimits[i]
		t, ok := rlimits[r.Type]
		if !ok {
			continue // refused with a sentence later
		}
		var have unix.Rlimit
		if err := unix.Getrlimit(t, &have); err != nil || r.Hard <= have.Max {
			continue
		}
		c.log.Warn("clamped rlimit: raising a hard limit needs CAP_SYS_RESOURCE", "rlimit", r.Type, "asked", r.Hard, "set", have.Max)
		r.Hard = have.Max
		r.Soft = min(r.Soft, r.Hard)
	}
}
