package spec

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Seccomp filters system calls: by the profile that Docker uses ("" or "default"), by a profile in a JSON file, in
// Docker's format or in the OCI spec's, or not at all ("unconfined"). Profiles allow more to a process that has the
// capability for it: give Seccomp after Capabilities.
func Seccomp(profile string) Option {
	return func(s *specs.Spec) error {
		if profile == "unconfined" {
			linux(s).Seccomp = nil
			return nil
		}
		// What a profile asks about is the bounding set, and it asks without looking whether there is one.
		about := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}}
		if c := process(s).Capabilities; c != nil {
			about.Process.Capabilities.Bounding = c.Bounding
		}
		var filter *specs.LinuxSeccomp
		var err error
		if profile == "" || profile == "default" {
			if filter, err = seccomp.GetDefaultProfile(about); err != nil {
				return fmt.Errorf("cannot use the default seccomp profile: %w", err)
			}
		} else if filter, err = loadSeccomp(profile, about); err != nil {
			return err
		}
		linux(s).Seccomp = filter
		return nil
	}
}

func loadSeccomp(file string, about *specs.Spec) (*specs.LinuxSeccomp, error) {
	body, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("seccomp profile %q does not exist: %w", file, errdefs.ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("cannot read seccomp profile %q: %w: %w", file, err, errdefs.ErrInvalidArgument)
	}
	var check seccomp.Seccomp
	if err := json.Unmarshal(body, &check); err != nil {
		return nil, fmt.Errorf("seccomp profile %q is not valid: %w: %w", file, err, errdefs.ErrInvalidArgument)
	}
	// Without a default action the loader says "no filter", which nobody who names a file means; a null it would trip over.
	if check.DefaultAction == "" || slices.Contains(check.Syscalls, nil) {
		return nil, fmt.Errorf("seccomp profile %q is not valid: no defaultAction, or a null among its system calls: %w", file, errdefs.ErrInvalidArgument)
	}
	filter, err := seccomp.LoadProfile(string(body), about)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile %q is not valid: %w: %w", file, err, errdefs.ErrInvalidArgument)
	}
	return filter, nil
}
