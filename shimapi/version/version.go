// Package version holds the stamp of the running code: what the linker set (see Makefile), else what the go command
// recorded in the binary.
package version

import "runtime/debug"

// Version is git describe's name of the build, Revision its commit. Both are set before any main begins.
var (
	Version  = ""
	Revision = ""
)

func init() {
	if Version != "" && Revision != "" {
		return
	}
	module, commit := "devel", "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		if info.Main.Version != "" && info.Main.Version != "(devel)" {
			module = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	if Version == "" {
		Version = module
	}
	if Revision == "" {
		Revision = commit
	}
}
