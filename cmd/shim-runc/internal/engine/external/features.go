package external

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// About is what a program says of itself.
type About struct {
	Path    string
	Version string // its first line of --version
	// Features is nil with a program that cannot say (crun before 1.8.6): it may have them all the same.
	Features *features.Features
}

// Describe asks a program, a path or a name to look for in PATH, what it is. FailedPrecondition names one that is missing
// or does not run.
func Describe(ctx context.Context, binary string) (About, error) {
	path, err := find(binary)
	if err != nil {
		return About{}, err
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return About{}, fmt.Errorf("cannot ask runtime %s (the runtime option BinaryName) for its version: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	about := About{Path: path}
	about.Version, _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	if f, err := (&runc.Runc{Command: path}).Features(ctx); err == nil {
		about.Features = f
	}
	return about, nil
}
