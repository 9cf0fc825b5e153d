package spec

import (
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// MemoryLimit limits memory, in bytes; 0 lifts the limit.
func MemoryLimit(bytes uint64) Option {
	return func(s *specs.Spec) error {
		if bytes > math.MaxInt64 {
			return fmt.Errorf("memory limit %d is too large: %w", bytes, errdefs.ErrInvalidArgument)
		}
		r := resources(s)
		if r.Memory == nil {
			r.Memory = &specs.LinuxMemory{}
		}
		r.Memory.Limit = nil
		if bytes > 0 {
			r.Memory.Limit = new(int64(bytes))
		}
		return nil
	}
}

// cpuPeriod is the period that quotas count against, in microseconds: the kernel's own default.
const cpuPeriod = 100_000

// CPUs limits CPU time to n processors' worth. The kernel's smallest quota is 1 ms per 100 ms, a hundredth of one.
func CPUs(n float64) Option {
	return func(s *specs.Spec) error {
		// Written so that NaN fails too. The upper end is far from overflow and beyond every machine.
		if !(n >= 0.01 && n <= 1e6) {
			return fmt.Errorf("number of CPUs %v is not between 0.01 and 1000000: %w", n, errdefs.ErrInvalidArgument)
		}
		c := cpu(s)
		c.Quota, c.Period = new(int64(math.Round(n*cpuPeriod))), new(uint64(cpuPeriod))
		return nil
	}
}

// CPUShares sets the weight against other containers where CPU time is short, 2 to 262144, 1024 being the usual.
func CPUShares(n uint64) Option {
	return func(s *specs.Spec) error {
		if n < 2 || n > 262144 {
			return fmt.Errorf("CPU shares %d are not between 2 and 262144: %w", n, errdefs.ErrInvalidArgument)
		}
		cpu(s).Shares = new(n)
		return nil
	}
}

// PidsLimit limits the number of processes and threads; -1 is no limit.
func PidsLimit(n int64) Option {
	return func(s *specs.Spec) error {
		if n == 0 || n < -1 {
			return fmt.Errorf("limit of %d processes is neither a number above 0 nor -1: %w", n, errdefs.ErrInvalidArgument)
		}
		resources(s).Pids = &specs.LinuxPids{Limit: new(n)}
		return nil
	}
}

func cpu(s *specs.Spec) *specs.LinuxCPU {
	r := resources(s)
	if r.CPU == nil {
		r.CPU = &specs.LinuxCPU{}
	}
	return r.CPU
}
