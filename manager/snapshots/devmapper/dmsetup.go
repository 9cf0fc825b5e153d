package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/thinpool"
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

// create makes a thin device seen under a name.
func (d dmsetup) create(ctx context.Context, name, pool string, device uint32, sectors uint64) error {
	_, err := d.run(ctx, "create", name, "--table", fmt.Sprintf("0 %d thin %s %d", sectors, thinpool.Node(pool), device))
	return err
}

// remove takes the name away; the device stays in the pool.
func (d dmsetup) remove(ctx context.Context, name string) error {
	is, err := thinpool.Active(name)
	if err != nil || !is {
		return err
	}
	_, err = d.run(ctx, "remove", "--retry", name)
	return err
}
