package spec

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// maxID is the highest user and group id that is taken: above it, some programs see negative numbers.
const maxID = math.MaxInt32

// User sets who the process is: "uid", "uid:gid", "name" or "name:group", parts in any mix. Names are looked up in
// /etc/passwd and /etc/group of rootfs, a directory where the container's root file system is mounted; "" stands for
// the spec's Root.Path if that is absolute. Digits are always a number, even if somebody has them for a name.
//
// Without a group the process has the user's own one, group 0 if no file knows the user, and those that list the user
// as a member. With one, it has that alone. Its main group is always among the additional ones, too: so that a file
// which forbids something to that group forbids it to the process, whatever group it changes to (CVE-2023-25173).
//
// user "" is what Image left to look up, and nothing if it left nothing. An unknown name is ErrNotFound, a name without
// a root file system to look in ErrInvalidArgument.
func User(user, rootfs string) Option {
	return func(s *specs.Spec) error {
		p, user := process(s), user
		if user == "" {
			user = p.User.Username
		}
		if user == "" {
			return nil
		}
		dir := rootfs
		if dir == "" && s.Root != nil && path.IsAbs(s.Root.Path) {
			dir = s.Root.Path
		}
		u, err := lookup(user, dir)
		if err != nil {
			return fmt.Errorf("cannot run as user %q: %w", user, err)
		}
		u.Umask = p.User.Umask
		p.User = u
		return nil
	}
}

// lookup makes of text, USER or USER:GROUP, the ids it means in the root file system dir ("": there is none).
func lookup(text, dir string) (specs.User, error) {
	wrong := func(format string, args ...any) (specs.User, error) {
		return specs.User{}, fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	who, group, grouped := strings.Cut(text, ":")
	if who == "" || grouped && group == "" || strings.ContainsAny(text, "\n\x00") || strings.Contains(group, ":") {
		return wrong("expected USER or USER:GROUP, names or numbers")
	}
	uid, uidGiven, err := id(who)
	if err != nil {
		return specs.User{}, fmt.Errorf("user %w", err)
	}
	gid, gidGiven, err := id(group)
	if err != nil {
		return specs.User{}, fmt.Errorf("group %w", err)
	}
	u := specs.User{UID: uid, GID: gid}
	if uidGiven && gidGiven {
		u.AdditionalGids = []uint32{gid}
		return u, nil
	}
	var passwd, groups [][]string
	switch {
	case dir != "":
		root, err := os.OpenRoot(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return specs.User{}, fmt.Errorf("root file system %q does not exist: %w", dir, errdefs.ErrNotFound)
		} else if err != nil {
			return specs.User{}, fmt.Errorf("cannot open root file system %q: %w: %w", dir, err, errdefs.ErrInvalidArgument)
		}
		defer root.Close()
		if passwd, err = table(root, "etc/passwd"); err != nil {
			return specs.User{}, err
		}
		if groups, err = table(root, "etc/group"); err != nil {
			return specs.User{}, err
		}
	case !uidGiven:
		return wrong("there is no root file system to look up the name %q in", who)
	case grouped:
		return wrong("there is no root file system to look up the group %q in", group)
	}

	name, own := "", uint32(0)
	line, found := find(passwd, func(f []string) bool {
		if !uidGiven {
			return f[0] == who
		}
		n, ok, err := id(f[2])
		return ok && err == nil && n == uid
	}, 4)
	switch {
	case found:
		// A damaged number is an error and not 0: 0 is root.
		var okUID, okGID bool
		if u.UID, okUID, err = id(line[2]); err != nil || !okUID {
			return wrong("/etc/passwd gives %q the user id %q, which is none", line[0], line[2])
		}
		if own, okGID, err = id(line[3]); err != nil || !okGID {
			return wrong("/etc/passwd gives %q the group id %q, which is none", line[0], line[3])
		}
		name = line[0]
	case !uidGiven && passwd == nil:
		return specs.User{}, fmt.Errorf("the root file system has no /etc/passwd to look up the name %q in: %w", who, errdefs.ErrNotFound)
	case !uidGiven:
		return specs.User{}, fmt.Errorf("/etc/passwd has no user %q: %w", who, errdefs.ErrNotFound)
	}

	switch {
	case gidGiven:
		u.AdditionalGids = []uint32{u.GID}
		return u, nil
	case grouped:
		line, found := find(groups, func(f []string) bool { return f[0] == group }, 3)
		if !found {
			return specs.User{}, fmt.Errorf("/etc/group has no group %q: %w", group, errdefs.ErrNotFound)
		}
		n, ok, err := id(line[2])
		if err != nil || !ok {
			return wrong("/etc/group gives %q the group id %q, which is none", group, line[2])
		}
		u.GID, u.AdditionalGids = n, []uint32{n}
		return u, nil
	}
	u.GID, u.AdditionalGids = own, []uint32{own}
	for _, f := range groups {
		if name == "" || len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), name) {
			continue
		}
		if n, ok, err := id(f[2]); ok && err == nil && !slices.Contains(u.AdditionalGids, n) {
			u.AdditionalGids = append(u.AdditionalGids, n)
		}
	}
	return u, nil
}

// id reads a user or group id: all digits. ok is false for what is a name; digits out of range are an error.
func id(s string) (n uint32, ok bool, err error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false, nil
	}
	v, err := strconv.ParseUint(s, 10, 32)
	if err != nil || v > maxID {
		return 0, false, fmt.Errorf("id %s is above %d: %w", s, maxID, errdefs.ErrInvalidArgument)
	}
	return uint32(v), true, nil
}

// find gives the first line that has at least the given number of fields and matches.
func find(lines [][]string, match func([]string) bool, fields int) ([]string, bool) {
	for _, f := range lines {
		if len(f) >= fields && match(f) {
			return f, true
		}
	}
	return nil, false
}
