package spec

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Device gives the container the host's device at file, under the same path, to read, write and make.
func Device(file string) Option {
	return func(s *specs.Spec) error {
		d, err := device(file)
		if err != nil {
			return err
		}
		addDevice(s, d)
		r := resources(s)
		r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: new(d.Major), Minor: new(d.Minor), Access: "rwm"})
		return nil
	}
}

// Privileged takes the fences away: every capability that the kernel knows and this machine can grant, sysfs and
// cgroups writable, no path masked or read-only, all devices of the host, no seccomp, AppArmor or SELinux. Namespaces,
// root file system and NoNewPrivileges stay as they are.
func Privileged() Option {
	return func(s *specs.Spec) error {
		p, l := process(s), linux(s)
		caps, err := grantable()
		if err != nil {
			return err
		}
		p.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Permitted: slices.Clone(caps), Effective: slices.Clone(caps)}
		p.ApparmorProfile, p.SelinuxLabel = "", ""
		l.Seccomp, l.MaskedPaths, l.ReadonlyPaths, l.MountLabel = nil, nil, nil, ""
		for i, m := range s.Mounts {
			if m.Type == "sysfs" || m.Type == "cgroup" || m.Type == "cgroup2" {
				options := slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
				if !slices.Contains(options, "rw") {
					options = append(options, "rw")
				}
				s.Mounts[i].Options = options
			}
		}
		devices, err := hostDevices("/dev")
		if err != nil {
			return err
		}
		for _, d := range devices {
			addDevice(s, d)
		}
		resources(s).Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		return nil
	}
}

func addDevice(s *specs.Spec, d specs.LinuxDevice) {
	l := linux(s)
	l.Devices = slices.DeleteFunc(l.Devices, func(have specs.LinuxDevice) bool { return have.Path == d.Path })
	l.Devices = append(l.Devices, d)
}

// device describes the device at file, which may be a symbolic link to it (/dev/disk/by-id/…).
func device(file string) (specs.LinuxDevice, error) {
	if !path.IsAbs(file) {
		return specs.LinuxDevice{}, fmt.Errorf("device %q is not an absolute path: %w", file, errdefs.ErrInvalidArgument)
	}
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return specs.LinuxDevice{}, fmt.Errorf("device %q does not exist: %w", file, errdefs.ErrNotFound)
	} else if err != nil {
		return specs.LinuxDevice{}, fmt.Errorf("cannot use device %q: %w: %w", file, err, errdefs.ErrInvalidArgument)
	}
	d := specs.LinuxDevice{Path: path.Clean(file), Type: "b", FileMode: new(info.Mode().Perm())}
	switch {
	case info.Mode()&fs.ModeCharDevice != 0:
		d.Type = "c"
	case info.Mode()&fs.ModeDevice == 0:
		return specs.LinuxDevice{}, fmt.Errorf("%q is not a device: %w", file, errdefs.ErrInvalidArgument)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return specs.LinuxDevice{}, fmt.Errorf("cannot tell the number of device %q: %w", file, errdefs.ErrInvalidArgument)
	}
	d.UID, d.GID = new(st.Uid), new(st.Gid)
	// glibc's layout of dev_t (gnu_dev_major(3)), which is the kernel's on every 64 bit machine.
	rdev := uint64(st.Rdev)
	d.Major = int64(rdev>>8&0xfff | rdev>>32&^0xfff)
	d.Minor = int64(rdev&0xff | rdev>>12&0xffffff00)
	return d, nil
}

// hostDevices are the devices below dir. What every container has of its own is left out, and so is what vanishes
// meanwhile: devices come and go.
func hostDevices(dir string) ([]specs.LinuxDevice, error) {
	var found []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return fmt.Errorf("cannot list the host's devices: %w", err)
		case e.IsDir():
			if slices.Contains([]string{"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"}, e.Name()) {
				return fs.SkipDir
			}
			return nil
		case e.Type()&fs.ModeDevice == 0 || e.Name() == "console":
			return nil
		}
		d, err := device(file)
		if errdefs.IsNotFound(err) {
			return nil
		} else if err != nil {
			return err
		}
		found = append(found, d)
		return nil
	})
	return found, err
}
