// Package verify asks programs whether an image may be pulled, as containerd's image verifiers are asked
// (docs/image-verification.md there). It must not know how images are pulled.
package verify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Config says which programs are asked.
type Config struct {
	Dir     string        // every file in it is a verifier; none when it is not there
	Max     int           // of verifiers that are asked, in the order of their names; less than 0: all
	Timeout time.Duration // of one of them
	Log     *slog.Logger  // nil: none
}

// maxOutput is how much of what a verifier writes to either stream is kept, in bytes.
const maxOutput = 32 << 10

// outputDelay is how long children of a verifier that left its process group may hold its output open.
const outputDelay = time.Second

// Dir asks the programs in a directory.
type Dir struct{ cfg Config }

// New returns a Dir.
func New(cfg Config) *Dir {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Dir{cfg}
}

// Verify asks, one after the other, whether the image desc may be pulled by this name. Each program has the arguments
// -name, -digest and -stdin-media-type and desc as JSON on its standard input; it allows the image by exiting with 0, and
// gives its reason on standard output. PermissionDenied when one of them does not; FailedPrecondition when one cannot
// be run or dies, DeadlineExceeded when it takes too long.
func (d *Dir) Verify(ctx context.Context, name string, desc ocispec.Descriptor) error {
	entries, err := os.ReadDir(d.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot list image verifiers: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	for i, e := range entries {
		if d.cfg.Max >= 0 && i >= d.cfg.Max {
			d.cfg.Log.Warn("image verifiers are left out: there are more than max_verifiers", "dir", d.cfg.Dir, "verifiers", len(entries), "max", d.cfg.Max)
			break
		}
		reason, err := d.ask(ctx, e.Name(), name, desc)
		if err != nil {
			return fmt.Errorf("image verifier %s: %w", e.Name(), err)
		}
		d.cfg.Log.Debug("image verifier allows the image", "verifier", e.Name(), "image", name, "digest", desc.Digest, "reason", reason)
	}
	return nil
}

func (d *Dir) ask(ctx context.Context, program, name string, desc ocispec.Descriptor) (reason string, err error) {
	in, err := json.Marshal(desc)
	if err != nil {
		return "", err
	}
	late := fmt.Errorf("it took longer than %v (per_verifier_timeout): %w", d.cfg.Timeout, context.DeadlineExceeded)
	ctx, cancel := context.WithTimeoutCause(ctx, d.cfg.Timeout, late)
	defer cancel()
	var stdout, stderr output
	cmd := exec.CommandContext(ctx, filepath.Join(d.cfg.Dir, program),
		"-name", name, "-digest", desc.Digest.String(), "-stdin-media-type", ocispec.MediaTypeDescriptor)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &stdout, &stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = outputDelay
	if err = cmd.Start(); err == nil {
		// Its children end with it: the group is its own until it is reaped.
		for unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		err = cmd.Wait()
	}
	if s := stderr.String(); s != "" {
		d.cfg.Log.Debug("image verifier says", "verifier", program, "stderr", s)
	}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil && err != nil:
		return "", context.Cause(ctx)
	case errors.As(err, &exit) && exit.Exited():
		return "", fmt.Errorf("it does not allow %s with digest %s (exit status %d): %s: %w", name, desc.Digest, exit.ExitCode(), stdout.String(), errdefs.ErrPermissionDenied)
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return stdout.String(), nil
}

// output keeps the beginning of what is written to it.
type output struct {
	data []byte
	more bool
}

func (o *output) Write(b []byte) (int, error) {
	n := min(len(b), maxOutput-len(o.data))
	o.data = append(o.data, b[:n]...)
	o.more = o.more || n < len(b)
	return len(b), nil
}

func (o *output) String() string {
	s := strings.ToValidUTF8(strings.TrimSpace(string(o.data)), "?")
	if o.more {
		s += " ..."
	}
	return s
}
