package mount

import (
	"strings"

	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
)

// ManagerOption begins the options that are for containerd's Mounts service (X-* of mount(8)). No kernel gets one.
const ManagerOption = "X-containerd."

// options is what a mount's option strings mean.
type options struct {
	bind        bool
	recursive   bool    // rbind
	set, clear  uintptr // mount(2) flags of this mount
	deep        uint64  // MOUNT_ATTR_* for everything below, too ("rro", ...)
	propagation uintptr // mount(2) flags, 0 for none
	loop        bool    // the source is a file to be made a device of
	ids         *idmap  // nil: as they are
	data        []string
}

var flags = map[string]struct {
	clear bool
	flag  uintptr
}{
	"async":         {true, unix.MS_SYNCHRONOUS},
	"atime":         {true, unix.MS_NOATIME},
	"defaults":      {},
	"dev":           {true, unix.MS_NODEV},
	"diratime":      {true, unix.MS_NODIRATIME},
	"dirsync":       {false, unix.MS_DIRSYNC},
	"exec":          {true, unix.MS_NOEXEC},
	"mand":          {false, unix.MS_MANDLOCK},
	"noatime":       {false, unix.MS_NOATIME},
	"nodev":         {false, unix.MS_NODEV},
	"nodiratime":    {false, unix.MS_NODIRATIME},
	"noexec":        {false, unix.MS_NOEXEC},
	"nomand":        {true, unix.MS_MANDLOCK},
	"norelatime":    {true, unix.MS_RELATIME},
	"nostrictatime": {true, unix.MS_STRICTATIME},
	"nosuid":        {false, unix.MS_NOSUID},
	"nosymfollow":   {false, unix.MS_NOSYMFOLLOW},
	"relatime":      {false, unix.MS_RELATIME},
	"ro":            {false, unix.MS_RDONLY},
	"rw":            {true, unix.MS_RDONLY},
	"strictatime":   {false, unix.MS_STRICTATIME},
	"suid":          {true, unix.MS_NOSUID},
	"sync":          {false, unix.MS_SYNCHRONOUS},
}

var propagations = map[string]uintptr{
	"private":     unix.MS_PRIVATE,
	"rprivate":    unix.MS_PRIVATE | unix.MS_REC,
	"shared":      unix.MS_SHARED,
	"rshared":     unix.MS_SHARED | unix.MS_REC,
	"slave":       unix.MS_SLAVE,
	"rslave":      unix.MS_SLAVE | unix.MS_REC,
	"unbindable":  unix.MS_UNBINDABLE,
	"runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

var deep = map[string]uint64{
	"rro":          unix.MOUNT_ATTR_RDONLY,
	"rnosuid":      unix.MOUNT_ATTR_NOSUID,
	"rnodev":       unix.MOUNT_ATTR_NODEV,
	"rnoexec":      unix.MOUNT_ATTR_NOEXEC,
	"rnosymfollow": unix.MOUNT_ATTR_NOSYMFOLLOW,
}

func parse(m *types.Mount) (*options, error) {
	if m.Type == "" {
		return nil, invalid("mount has no type")
	}
	o := &options{bind: m.Type == "bind" || m.Type == "rbind", recursive: m.Type == "rbind"}
	var ids idmap
	for _, s := range m.Options {
		if strings.IndexByte(s, 0) >= 0 {
			return nil, invalid("option %q has a NUL byte", s)
		}
		if f, ok := flags[s]; ok {
			if f.clear {
				o.set, o.clear = o.set&^f.flag, o.clear|f.flag
			} else {
				o.set, o.clear = o.set|f.flag, o.clear&^f.flag
			}
			continue
		}
		if p, ok := propagations[s]; ok {
			o.propagation = p // the last one counts
			continue
		}
		if d, ok := deep[s]; ok {
			o.deep |= d
			continue
		}
		var err error
		switch k, v, _ := strings.Cut(s, "="); k {
		case "bind":
			o.bind = true
		case "rbind":
			o.bind, o.recursive = true, true
		case "loop":
			o.loop = true
		case "uidmap":
			ids.uid, err = ParseIDs(k, v)
		case "gidmap":
			ids.gid, err = ParseIDs(k, v)
		case "":
		default:
			if strings.HasPrefix(s, ManagerOption) {
				return nil, invalid("option %q is for who prepares the mount (the Mounts service), and nobody has", s)
			}
			o.data = append(o.data, s)
		}
		if err != nil {
			return nil, err
		}
	}
	switch {
	case (ids.uid == nil) != (ids.gid == nil):
		return nil, invalid("uidmap and gidmap go together")
	case ids.uid != nil:
		o.ids = &ids
	}
	if o.bind && o.loop {
		return nil, invalid("bind mount does not know option \"loop\"")
	}
	if o.bind && m.Source == "" {
		return nil, invalid("bind mount has no source")
	}
	if o.bind && len(o.data) > 0 {
		return nil, invalid("bind mount does not know option %q", o.data[0])
	}
	return o, nil
}

// attrs translates the mount(2) flags of one mount to mount_setattr(2).
func (o *options) attrs() unix.MountAttr {
	a := unix.MountAttr{}
	for _, f := range []struct {
		flag uintptr
		attr uint64
	}{
		{unix.MS_RDONLY, unix.MOUNT_ATTR_RDONLY},
		{unix.MS_NOSUID, unix.MOUNT_ATTR_NOSUID},
		{unix.MS_NODEV, unix.MOUNT_ATTR_NODEV},
		{unix.MS_NOEXEC, unix.MOUNT_ATTR_NOEXEC},
		{unix.MS_NODIRATIME, unix.MOUNT_ATTR_NODIRATIME},
		{unix.MS_NOSYMFOLLOW, unix.MOUNT_ATTR_NOSYMFOLLOW},
	} {
		if o.set&f.flag != 0 {
			a.Attr_set |= f.attr
		}
	}
	// The three ways to treat atime are one field, which must be cleared whole before it is set.
	switch {
	case o.set&unix.MS_NOATIME != 0:
		a.Attr_clr, a.Attr_set = unix.MOUNT_ATTR__ATIME, a.Attr_set|unix.MOUNT_ATTR_NOATIME
	case o.set&unix.MS_STRICTATIME != 0:
		a.Attr_clr, a.Attr_set = unix.MOUNT_ATTR__ATIME, a.Attr_set|unix.MOUNT_ATTR_STRICTATIME
	case o.set&unix.MS_RELATIME != 0:
		a.Attr_clr = unix.MOUNT_ATTR__ATIME // relatime is the zero value
	}
	return a
}
