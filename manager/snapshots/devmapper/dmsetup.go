package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// dmsetup runs dmsetup(8), whose errors are the kernel's by their words, for what makes a device seen and takes it away: it
// keeps the nodes in /dev/mapper, with udev or without. Everything else is asked from the kernel itself.
type dmsetup struct{ path string }

// words of strerror(3) that say what somebody can go on from.
var words = map[string]error{
	"No such device or address": unix.ENXIO,
	"Device or resource busy":   unix.EBUSY,
	"File exists":               unix.EEXIST,
	"No data available":         unix.ENODATA,
	"No space left on device":   unix.ENOSPC,
	"No such device":            unix.ENODEV,
}

func (d dmsetup) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, d.path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil {
		return strings.TrimSpace(string(out)), nil
	}
	said := strings.TrimSpace(stderr.String())
	err = fmt.Errorf("dmsetup %s: %w: %s", strings.Join(args, " "), err, said)
	for text, errno := range words {
		if strings.Contains(said, text+"\n") || strings.HasSuffix(said, text) || strings.Contains(said, text+".") {
			return "", errors.Join(err, errno)
		}
	}
	return "", err
}

// active says whether a device of this name is there. The kernel says it without a program's help.
func active(name string) (bool, error) {
	found, err := filepath.Glob("/sys/block/dm-*/dm/name")
	if err != nil {
		return false, err
	}
	for _, f := range found {
		if n, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(n)) == name { // else it has gone meanwhile
			return true, nil
		}
	}
	return false, nil
}

// create makes a thin device seen under a name.
func (d dmsetup) create(ctx context.Context, name, pool string, device uint32, sectors uint64) error {
	_, err := d.run(ctx, "create", name, "--table", fmt.Sprintf("0 %d thin %s %d", sectors, node(pool), device))
	return err
}

// remove takes the name away; the device stays in the pool.
func (d dmsetup) remove(ctx context.Context, name string) error {
	is, err := active(name)
	if err != nil || !is {
		return err
	}
	_, err = d.run(ctx, "remove", "--retry", name)
	return err
}

// mapped is how many sectors of a thin device have blocks in the pool.
func mapped(name string) (uint64, error) {
	says, err := status(name, "thin")
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

// poolStatus is what the kernel says of a thin pool (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
type poolStatus struct {
	metaUsed, metaTotal, dataUsed, dataTotal uint64 // blocks
	mode                                     string // rw, ro, out_of_data_space, or Fail
}

func parsePool(says string) (poolStatus, error) {
	f := strings.Fields(says) // TRANSACTION META DATA HELD MODE ...
	if len(f) == 1 && f[0] == "Fail" {
		return poolStatus{mode: "Fail"}, nil
	}
	bad := fmt.Errorf("status of the thin pool is %q", says)
	if len(f) < 5 {
		return poolStatus{}, bad
	}
	p := poolStatus{mode: f[4]}
	for i, to := range [][2]*uint64{{&p.metaUsed, &p.metaTotal}, {&p.dataUsed, &p.dataTotal}} {
		used, total, _ := strings.Cut(f[1+i], "/")
		for j, s := range []string{used, total} {
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				return poolStatus{}, bad
			}
			*to[j] = n
		}
	}
	return p, nil
}

// usable is an error when nothing more goes into the pool: ResourceExhausted, or Unavailable for one that is broken.
func (p poolStatus) usable(name string) error {
	how := fmt.Sprintf("data %d of %d blocks, metadata %d of %d, mode %s", p.dataUsed, p.dataTotal, p.metaUsed, p.metaTotal, p.mode)
	switch {
	case p.mode == "Fail":
		return fmt.Errorf("thin pool %s has failed: repair it (thin_repair): %w", name, errdefs.ErrUnavailable)
	case p.mode == "out_of_data_space", p.dataUsed >= p.dataTotal:
		return fmt.Errorf("thin pool %s is full (%s): extend its data device, or remove snapshots: %w", name, how, errdefs.ErrResourceExhausted)
	case p.mode == "ro", p.metaUsed >= p.metaTotal:
		return fmt.Errorf("thin pool %s takes no changes (%s): extend its metadata device, or repair it (thin_repair): %w", name, how, errdefs.ErrResourceExhausted)
	}
	return nil
}

// pool is the status of a thin pool; InvalidArgument when the device is something else.
func pool(name string) (poolStatus, error) {
	says, err := status(name, "thin-pool")
	if errors.Is(err, unix.EINVAL) {
		return poolStatus{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return poolStatus{}, err
	}
	return parsePool(says)
}

// node is where a device is seen.
func node(name string) string { return "/dev/mapper/" + name }
