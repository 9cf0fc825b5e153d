// Package clients builds clients of containerd's API that Debian does not have, each as a program of its own: nothing of
// them is linked into anything here. NAME.mod and NAME.sum pin what one is made of, down to the bytes.
package clients

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

//go:embed *.mod *.sum
var pinned embed.FS

// Client is a program, and the package that it is built of.
type Client struct{ name, pkg string }

// Ctr is containerd's own command line client, of containerd 2.
var Ctr = Client{"ctr", "github.com/containerd/containerd/v2/cmd/ctr"}

// Build gives the path of a client, which is built if no one has done that before: the programs are kept in the user's
// cache directory, by what they are made of. It needs the go command and, for what is not in its module cache, the module
// proxy.
func Build(c Client) (path string, err error) {
	mod, err := pinned.ReadFile(c.name + ".mod")
	if err != nil {
		return "", err
	}
	sum, err := pinned.ReadFile(c.name + ".sum")
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	of := sha256.Sum256([]byte(strings.Join([]string{runtime.Version(), runtime.GOARCH, string(mod), string(sum)}, "\n")))
	dir := filepath.Join(cache, "managerd-test", c.name+"-"+hex.EncodeToString(of[:6]))
	path = filepath.Join(dir, c.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := c.build(path, mod, sum); err != nil {
		return "", fmt.Errorf("cannot build %s: %w", c.pkg, err)
	}
	return path, nil
}

func (c Client) build(path string, mod, sum []byte) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), "build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for name, data := range map[string][]byte{"go.mod": mod, "go.sum": sum} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	made := filepath.Join(dir, c.name)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", made, c.pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly -buildvcs=false", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return os.Rename(made, path)
}
