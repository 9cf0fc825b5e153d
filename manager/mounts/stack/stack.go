// Package stack keeps what one activation of mounts has on this machine, in a directory of its own: a mount point, or the
// link to a loop device, for each mount, the names of files that are half made, and the record. By that directory alone
// all of it can be taken away, also by who knows no database. It must not know for whom it is.
package stack

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	records "github.com/managerd/managerd/protos/mounts"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/mount"
)

// Dir is where the stacks are, below the daemon's state directory.
const Dir = "mounts"

const (
	recordFile = "record"
	halfMade   = ".file" // ends the link to a file that is being made
)

// Path is the directory of an activation.
func Path(state, ns, name string) string {
	sum := sha256.Sum256([]byte(ns + "\x00" + name))
	return filepath.Join(state, Dir, hex.EncodeToString(sum[:16]))
}

// Boot is the id of this boot: a stack of another one is gone.
func Boot() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// All gives the directories of all stacks.
func All(state string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(state, Dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, filepath.Join(state, Dir, e.Name()))
	}
	return out, err
}

// Read gives the record. fs.ErrNotExist: there is none, or not yet; DataLoss when it is damaged.
func Read(dir string) (*records.Activation, error) {
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return nil, err
	}
	r := &records.Activation{}
	if err := r.Unmarshal(data); err != nil {
		return nil, fmt.Errorf("its record is damaged: %w: %w", err, errdefs.ErrDataLoss)
	}
	return r, nil
}

// Write writes the record, whole or not at all.
func Write(dir string, r *records.Activation) error {
	data, err := r.Marshal()
	if err != nil {
		return err
	}
	file := filepath.Join(dir, recordFile)
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// Mount makes the i-th mount.
func Mount(dir string, i int, m *types.Mount) (point string, err error) {
	point = filepath.Join(dir, strconv.Itoa(i))
	if err := os.Mkdir(point, 0o700); err != nil {
		return "", err
	}
	if err := mount.Mount([]*types.Mount{m}, point); err != nil {
		return "", err
	}
	failpoint.Hit("mounts.mounted")
	return point, nil
}

// Note says, before path is made, that it is half made.
func Note(dir string, i int, path string) error {
	if err := os.Symlink(path, filepath.Join(dir, strconv.Itoa(i)+halfMade)); err != nil {
		return err
	}
	failpoint.Hit("mounts.file.noted")
	return nil
}

// Drop removes what is half made for the i-th mount.
func Drop(dir string, i int) error {
	link := filepath.Join(dir, strconv.Itoa(i)+halfMade)
	path, err := os.Readlink(link)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	return os.Remove(link)
}

// Undo takes all of it away, the last mount first, and the record last. FailedPrecondition while somebody uses a mount; the
// record, and what stands before that mount, stay then. No directory is no error.
func Undo(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var numbers []int
	for _, e := range entries {
		name, half := strings.CutSuffix(e.Name(), halfMade)
		n, err := strconv.Atoi(name)
		switch {
		case err != nil:
		case half:
			if err := Drop(dir, n); err != nil {
				return err
			}
		default:
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	for _, n := range slices.Backward(numbers) {
		if err := undo(dir, n); err != nil {
			return err
		}
		failpoint.Hit("mounts.undone")
	}
	for _, f := range []string{recordFile, recordFile + ".new"} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	failpoint.Hit("mounts.forgotten")
	return os.Remove(dir) // never RemoveAll: something may be mounted after all
}

func undo(dir string, n int) error {
	point := filepath.Join(dir, strconv.Itoa(n))
	if device, err := os.Readlink(point); err == nil {
		if err := detach(device, loopName(dir, n)); err != nil {
			return err
		}
	} else if err := unmount(point); err != nil {
		return err
	}
	return os.Remove(point)
}

// unmount unmounts what is mounted on point, if nobody uses it: what stands below may be removed next.
func unmount(point string) error {
	for {
		err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("%s is in use (`fuser -vm %s` tells by whom): %w", point, point, errdefs.ErrFailedPrecondition)
		default:
			return fmt.Errorf("cannot unmount %s: %w", point, err)
		}
	}
}
