package engine

import (
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

// TestMountOptions: every option that this program says it knows has its effect, the recursive ones on mounts below too.
func TestMountOptions(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: a container for each of sixty options")
	}
	f := newFixture(t)
	left := map[string]bool{}
	for _, o := range specconv.KnownMountOptions() {
		left[o] = true
	}
	check := func(t *testing.T, m specs.Mount, effect string, min int) {
		t.Helper()
		for _, o := range m.Options {
			delete(left, o)
		}
		out := f.runShell(t, func(s *specs.Spec) {
			if slices.Contains(m.Options, "remount") {
				s.Mounts = append(s.Mounts, specs.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source})
			}
			s.Mounts = append(s.Mounts, m)
		},
			"awk '$5==\"/tmp\" || index($5,\"/tmp/\")==1' /proc/self/mountinfo")
		lines := strings.Split(out, "\n")
		if len(lines) < min {
			t.Fatalf("mounts: %q, want %d", lines, min)
		}
		want, not := strings.CutPrefix(effect, "!")
		for _, line := range lines {
			words := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == ',' || r == ':' })
			if effect != "" && slices.Contains(words, want) == not {
				t.Errorf("%v: %s, want %q", m.Options, line, effect)
			}
		}
	}
	for _, row := range mountRows {
		t.Run(row.options, func(t *testing.T) {
			m := specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: strings.Split(row.options, ",")}
			check(t, m, row.effect, 1)
		})
	}
	for _, row := range bindRows {
		t.Run(row.options, func(t *testing.T) {
			m := specs.Mount{Destination: "/tmp", Source: "/dev", Options: strings.Split(row.options, ",")}
			min := 1
			if strings.HasPrefix(row.options, "rbind") {
				min = 2 // devpts at least
			}
			check(t, m, row.effect, min)
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
