package engine

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// mountRows are what an option does to a mount: what its line of mountinfo then says, or with a "!" no longer says. Those
// that undo another follow on it. An empty effect is none that the kernel shows.
var mountRows = []struct{ options, effect string }{
	{"defaults", "rw"}, {"ro", "ro"}, {"ro,rw", "rw"}, {"nosuid", "nosuid"}, {"nosuid,suid", "!nosuid"}, {"nodev", "nodev"},
	{"nodev,dev", "!nodev"}, {"noexec", "noexec"}, {"noexec,exec", "!noexec"}, {"noatime", "noatime"}, {"noatime,atime", "!noatime"},
	{"nodiratime", "nodiratime"}, {"nodiratime,diratime", "!nodiratime"}, {"relatime", "relatime"}, {"strictatime", "!relatime"},
	{"strictatime,nostrictatime", "relatime"}, {"norelatime", ""}, {"nosymfollow", "nosymfollow"}, {"nosymfollow,symfollow", "!nosymfollow"},
	{"sync", "sync"}, {"sync,async", "!sync"}, {"dirsync", "dirsync"}, {"lazytime", "lazytime"}, {"lazytime,nolazytime", "!lazytime"},
	// The kernel takes these, and knows locks and versions no other way than its own.
	{"mand", ""}, {"nomand", ""}, {"iversion", ""}, {"noiversion", ""}, {"silent", ""}, {"loud", ""},
	{"private", "!shared"}, {"rprivate", "!shared"}, {"shared", "shared"}, {"rshared", "shared"}, {"shared,slave", "!shared"}, {"shared,rslave", "!shared"},
	{"unbindable", "unbindable"}, {"runbindable", "unbindable"}, {"tmpcopyup", ""}, {"remount,ro", "ro"},
}

// bindRows are the options of bind mounts: what all mounts at the target and below it say.
var bindRows = []struct{ options, effect string }{
	{"bind", "rw"}, {"rbind", "rw"},
	{"rbind,rro", "ro"}, {"rbind,rro,rrw", "rw"}, {"rbind,rnosuid", "nosuid"}, {"rbind,rnosuid,rsuid", "!nosuid"}, {"rbind,rnodev", "nodev"},
	{"rbind,rnodev,rdev", "!nodev"}, {"rbind,rnoexec", "noexec"}, {"rbind,rnoexec,rexec", "!noexec"}, {"rbind,rnodiratime", "nodiratime"},
	{"rbind,rnodiratime,rdiratime", "!nodiratime"}, {"rbind,rnoatime", "noatime"}, {"rbind,rnoatime,ratime", "!noatime"},
	{"rbind,rrelatime", "relatime"}, {"rbind,rnorelatime", "relatime"}, {"rbind,rstrictatime", "!relatime"}, {"rbind,rnostrictatime", "relatime"},
	{"rbind,rnosymfollow", "nosymfollow"}, {"rbind,rnosymfollow,rsymfollow", "!nosymfollow"},
}

// TestMountOptions: every option that this program says it knows has its effect, the recursive ones on mounts below too. One
// container has a mount for each row.
func TestMountOptions(t *testing.T) {
	f := newFixture(t)
	left := map[string]bool{}
	for _, o := range specconv.KnownMountOptions() {
		left[o] = true
	}
	var mounts []specs.Mount
	type check struct {
		at, options, effect string
		min                 int // mounts there
	}
	var checks []check
	add := func(m specs.Mount, options, effect string, min int) {
		m.Destination, m.Options = fmt.Sprint("/tmp/", len(checks)), strings.Split(options, ",")
		checks = append(checks, check{m.Destination, options, effect, min})
		for _, o := range m.Options {
			delete(left, o)
		}
		if slices.Contains(m.Options, "remount") {
			mounts = append(mounts, specs.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source})
		}
		mounts = append(mounts, m)
	}
	for _, row := range mountRows {
		add(specs.Mount{Type: "tmpfs", Source: "tmpfs"}, row.options, row.effect, 1)
	}
	for _, row := range bindRows {
		min := 1
		if strings.HasPrefix(row.options, "rbind") {
			min = 2 // devpts at least
		}
		add(specs.Mount{Source: "/dev"}, row.options, row.effect, min)
	}
	found := map[string][]string{}
	for line := range strings.Lines(f.runShell(t, func(s *specs.Spec) { s.Mounts = append(s.Mounts, mounts...) }, "cat /proc/self/mountinfo")) {
		if below, ok := strings.CutPrefix(strings.Fields(line)[4], "/tmp/"); ok {
			at, _, _ := strings.Cut(below, "/")
			found["/tmp/"+at] = append(found["/tmp/"+at], line)
		}
	}
	for _, c := range checks {
		t.Run(c.options, func(t *testing.T) {
			if lines := found[c.at]; len(lines) < c.min {
				t.Fatalf("mounts: %q, want %d", lines, c.min)
			}
			want, not := strings.CutPrefix(c.effect, "!")
			for _, line := range found[c.at] {
				words := strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" ,:\n", r) })
				if c.effect != "" && slices.Contains(words, want) == not {
					t.Errorf("%s, want %q", line, c.effect)
				}
			}
		})
	}
	for o := range left {
		t.Errorf("%s is not tested", o)
	}
}

// TestCopyUp: tmpcopyup fills a new tmpfs with what was there.
func TestCopyUp(t *testing.T) {
	f := newFixture(t)
	got := f.runShell(t, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/bin", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup"}})
	}, "stat -f -c %T /bin; [ -x /bin/busybox ] && echo there")
	if got != "tmpfs\nthere" {
		t.Errorf("got %q", got)
	}
}
