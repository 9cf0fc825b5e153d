// Package version holds the stamp of the running code; the linker sets it (see Makefile).
package version

// Version is git describe's name of the build, Revision its commit.
var (
	Version  = "devel"
	Revision = "unknown"
)
