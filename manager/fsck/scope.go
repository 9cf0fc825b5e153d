package fsck

import "strings"

// cgroupOf gives the path, below each hierarchy, of what linux.cgroupsPath means: a path, or with systemd's driver
// SLICE:PREFIX:NAME, which is the scope PREFIX-NAME.scope in SLICE (runc's systemd documentation). Empty: it says nothing.
func cgroupOf(cgroupsPath string) string {
	if strings.HasPrefix(cgroupsPath, "/") {
		return cgroupsPath
	}
	parts := strings.Split(cgroupsPath, ":")
	if len(parts) != 3 || parts[2] == "" {
		return ""
	}
	slice, prefix, name := parts[0], parts[1], parts[2]
	if slice == "" {
		slice = "system.slice"
	}
	above, ok := expandSlice(slice)
	switch {
	case !ok || strings.Contains(prefix+name, "/"):
		return ""
	case strings.HasSuffix(name, ".slice"):
		above, _ = expandSlice(name)
		return above
	case prefix != "":
		name = prefix + "-" + name
	}
	return above + "/" + name + ".scope"
}

// expandSlice gives the path of a slice: a-b.slice is in a.slice (systemd.slice(5)).
func expandSlice(slice string) (path string, ok bool) {
	name, is := strings.CutSuffix(slice, ".slice")
	if !is || name == "" || strings.Contains(name, "/") {
		return "", false
	}
	if name == "-" {
		return "", true
	}
	unit := ""
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", false
		}
		unit += part
		path += "/" + unit + ".slice"
		unit += "-"
	}
	return path, true
}
