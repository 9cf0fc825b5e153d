package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// invalid is an error of kind InvalidArgument about the container's config.json.
func invalid(format string, a ...any) error {
	return fmt.Errorf("invalid spec: "+format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}

// Check refuses what a runtime would crash on, misread or pass over in silence, whichever runs the container
// (InvalidArgument), and makes the rootfs path absolute.
func Check(bundle string, spec *specs.Spec) error {
	switch {
	case spec == nil:
		return fmt.Errorf("no spec: %w", errdefs.ErrInvalidArgument)
	case spec.Version != "" && !strings.HasPrefix(spec.Version, "1."):
		return invalid("ociVersion %q: version 1 of the runtime specification is known here", spec.Version)
	case spec.Process == nil:
		return invalid("process is missing")
	case len(spec.Process.Args) == 0:
		return invalid("process.args is empty")
	case spec.Process.Cwd == "" || !filepath.IsAbs(spec.Process.Cwd):
		return invalid("process.cwd %q is not an absolute path", spec.Process.Cwd)
	case spec.Root == nil || spec.Root.Path == "":
		return invalid("root.path is missing")
	case spec.Linux == nil:
		return invalid("the linux section is missing")
	case spec.Linux.MountLabel != "" && !selinux():
		return invalid("linux.mountLabel is set, and this kernel has no SELinux")
	}
	if err := foreign(spec); err != nil {
		return err
	}
	if err := checkHooks(spec.Hooks); err != nil {
		return err
	}
	if !filepath.IsAbs(spec.Root.Path) {
		spec.Root.Path = filepath.Join(bundle, spec.Root.Path)
	}
	fi, err := os.Stat(spec.Root.Path)
	if err != nil {
		return fmt.Errorf("invalid rootfs: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if !fi.IsDir() {
		return fmt.Errorf("invalid rootfs: %s is not a directory: %w", spec.Root.Path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// foreign refuses what is for another platform.
func foreign(spec *specs.Spec) error {
	for _, f := range []struct {
		name string
		set  bool
	}{
		{"solaris", spec.Solaris != nil}, {"windows", spec.Windows != nil}, {"vm", spec.VM != nil}, {"zos", spec.ZOS != nil},
		{"freebsd", spec.FreeBSD != nil}, {"process.commandLine", spec.Process.CommandLine != ""},
		{"process.user.username", spec.Process.User.Username != ""},
	} {
		if f.set {
			return invalid("%s is for another platform than linux", f.name)
		}
	}
	return nil
}

// checkHooks refuses hooks that could not be found, or whose time is up before they begin.
func checkHooks(hooks *specs.Hooks) error {
	if hooks == nil {
		return nil
	}
	for _, point := range []struct {
		name  string
		hooks []specs.Hook
	}{
		//lint:ignore SA1019 old clients set it
		{"prestart", hooks.Prestart}, {"createRuntime", hooks.CreateRuntime}, {"createContainer", hooks.CreateContainer},
		{"startContainer", hooks.StartContainer}, {"poststart", hooks.Poststart}, {"poststop", hooks.Poststop},
	} {
		for i, h := range point.hooks {
			if !filepath.IsAbs(h.Path) {
				return invalid("hooks.%s[%d].path %q is not an absolute path", point.name, i, h.Path)
			}
			if h.Timeout != nil && *h.Timeout <= 0 {
				return invalid("hooks.%s[%d].timeout is %d, must be more than 0 seconds", point.name, i, *h.Timeout)
			}
		}
	}
	return nil
}

// selinux says whether the kernel takes labels; without it a mount with one fails with no word about the reason.
func selinux() bool {
	_, err := os.Stat("/sys/fs/selinux/enforce")
	return err == nil
}
