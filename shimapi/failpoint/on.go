//go:build failpoints

package failpoint

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// env names the directory with a file for each point at which somebody is to be killed.
const env = "MANAGERD_FAILPOINTS"

// Hit kills this process if a test has asked for it.
func Hit(name string) {
	dir := os.Getenv(env)
	if dir == "" || os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".hit")) != nil {
		return
	}
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // it ends here, whichever thread the signal reaches first
}
