package overlayfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

const (
	bootID = "/proc/sys/kernel/random/boot_id"
	// bootFile, in the directory of a snapshot, has the boot in which it was last given out as volatile.
	bootFile = "boot"
)

// fresh makes a layer fit to be mounted again that was mounted volatile before. The kernel marks such a layer and refuses
// it from then on, because after a crash nobody knows what of it is on disk. In the boot in which it was written nothing
// can have been lost. FailedPrecondition: it was written in another boot.
func (b *Backend) fresh(id uint64) error {
	mark := filepath.Join(b.Dirs.Path(id), work, "work", "incompat", volatile)
	note := filepath.Join(b.Dirs.Path(id), bootFile)
	_, err := os.Lstat(mark)
	unmarked := errors.Is(err, fs.ErrNotExist)
	if unmarked && !b.volatile {
		return nil
	}
	if err != nil && !unmarked {
		return err
	}
	now, err := os.ReadFile(b.boot)
	if err != nil {
		return err
	}
	if unmarked {
		return os.WriteFile(note, now, 0o600)
	}
	if then, err := os.ReadFile(note); err != nil || !bytes.Equal(then, now) {
		return fmt.Errorf("it was written with the mount option volatile before the machine went down, and what of it is on disk is not known: remove it and prepare another one, or remove %s to use it as it is: %w",
			mark, errdefs.ErrFailedPrecondition)
	}
	return os.RemoveAll(mark)
}
