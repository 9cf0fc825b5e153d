package thinpool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Mapped is how many sectors (of 512 bytes) of a thin device have blocks in the pool.
func Mapped(name string) (uint64, error) {
	says, err := describe(name, "thin", 0)
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(says, " ") // MAPPED HIGHEST
	n, err := strconv.ParseUint(first, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("status of thin device %s is %q", name, says)
	}
	return n, nil
}

// Status is what the kernel says of a thin pool (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
type Status struct {
	name                                     string
	metaUsed, metaTotal, dataUsed, dataTotal uint64 // blocks
	mode                                     string // rw, ro, out_of_data_space, or Fail
}

func parse(name, says string) (Status, error) {
	f := strings.Fields(says) // TRANSACTION META DATA HELD MODE ...
	if len(f) == 1 && f[0] == "Fail" {
		return Status{name: name, mode: "Fail"}, nil
	}
	bad := fmt.Errorf("status of thin pool %s is %q", name, says)
	if len(f) < 5 {
		return Status{}, bad
	}
	p := Status{name: name, mode: f[4]}
	for i, to := range [][2]*uint64{{&p.metaUsed, &p.metaTotal}, {&p.dataUsed, &p.dataTotal}} {
		used, total, _ := strings.Cut(f[1+i], "/")
		for j, s := range []string{used, total} {
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				return Status{}, bad
			}
			*to[j] = n
		}
	}
	return p, nil
}

// Usable is an error when nothing more goes into the pool: ResourceExhausted, or Unavailable for one that is broken.
func (p Status) Usable() error {
	how := fmt.Sprintf("data %d of %d blocks, metadata %d of %d, mode %s", p.dataUsed, p.dataTotal, p.metaUsed, p.metaTotal, p.mode)
	switch {
	case p.mode == "Fail":
		return fmt.Errorf("thin pool %s has failed: repair it (thin_repair): %w", p.name, errdefs.ErrUnavailable)
	case p.mode == "out_of_data_space", p.dataUsed >= p.dataTotal:
		return fmt.Errorf("thin pool %s is full (%s): extend its data device, or remove snapshots: %w", p.name, how, errdefs.ErrResourceExhausted)
	case p.mode == "ro", p.metaUsed >= p.metaTotal:
		return fmt.Errorf("thin pool %s takes no changes (%s): extend its metadata device, or repair it (thin_repair): %w", p.name, how, errdefs.ErrResourceExhausted)
	}
	return nil
}

// Get gives the status of a thin pool; InvalidArgument when the device is something else.
func Get(name string) (Status, error) {
	says, err := describe(name, "thin-pool", 0)
	if errors.Is(err, unix.EINVAL) {
		return Status{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return Status{}, err
	}
	return parse(name, says)
}

const nodes = "/dev/mapper/"

// Node is where a device is seen.
func Node(name string) string { return nodes + name }

// Full says of the thin device that is seen at path why its pool takes nothing more, see Usable; nil when it does, and when
// that is no thin device.
func Full(path string) error {
	name, ok := strings.CutPrefix(path, nodes)
	if !ok {
		return nil
	}
	line, err := describe(name, "thin", table) // MAJOR:MINOR of the pool, NUMBER
	if err != nil {
		return nil
	}
	number, _, _ := strings.Cut(line, " ")
	of, err := os.ReadFile(filepath.Join("/sys/dev/block", number, "dm/name"))
	if err != nil {
		return nil
	}
	p, err := Get(strings.TrimSpace(string(of)))
	if err != nil {
		return nil
	}
	return p.Usable()
}
