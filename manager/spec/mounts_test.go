package spec

import (
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestParseMount(t *testing.T) {
	for _, c := range []struct {
		in   string
		want specs.Mount
	}{
		{"type=bind,src=/a,dst=/b,options=rbind:ro", specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind", "ro"}}},
		{"type=bind,source=/a,destination=/b/,options=bind", specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"bind"}}},
		{"src=/a,target=/b", specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind"}}},
		{"type=bind,src=/a,dst=/b,options=ro", specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind", "ro"}}},
		{"type=tmpfs,dst=/t,options=size=1m::mode=700", specs.Mount{Type: "tmpfs", Destination: "/t", Options: []string{"size=1m", "mode=700"}}},
		{`type=bind,"src=/a,b",dst=/b`, specs.Mount{Type: "bind", Source: "/a,b", Destination: "/b", Options: []string{"rbind"}}},
		{"type=bind,src=/a=b,dst=/b=c", specs.Mount{Type: "bind", Source: "/a=b", Destination: "/b=c", Options: []string{"rbind"}}},
		{"dst=/b,options=rbind,src=/a", specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind"}}},
	} {
		if got, err := ParseMount(c.in); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %+v, %v; want %+v", c.in, got, err, c.want)
		}
	}
	for in, why := range map[string]string{
		"":                                  "separated",
		"bind":                              "KEY=VALUE",
		"type=bind,src=/a":                  "destination",
		"type=bind,src=/a,dst=b":            "destination",
		"type=bind,src=/a,dst=/":            "root",
		"type=bind,src=a,dst=/b":            "source",
		"type=bind,dst=/b":                  "source",
		"dst=/b":                            "type",
		"dst=/b,src=x":                      "type",
		"type=bind,src=/a,dst=/b,ro":        `"ro"`,
		"type=bind,src=/a,dst=/b,mode=ro":   `"mode"`,
		"type=bind,src=/a,source=/c,dst=/b": "twice",
		"type=tmpfs,dst=/a\ntype=tmpfs":     "line breaks",
		"type=tmpfs,dst=/a\x00":             "zero",
		`type=tmpfs,"dst=/a`:                "separated",
	} {
		if _, err := ParseMount(in); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), why) {
			t.Errorf("%q: error %v, want %s", in, err, why)
		}
	}
}

// TestMounts: a mount on a known path takes the place of the old one, a new one comes last.
func TestMounts(t *testing.T) {
	options := []string{"rbind"}
	s := apply(t, Mounts(
		specs.Mount{Destination: "/dev/", Type: "bind", Source: "/dev", Options: options},
		specs.Mount{Destination: "/data", Type: "tmpfs", Source: "tmpfs"},
	))
	base := apply(t).Mounts
	if len(s.Mounts) != len(base)+1 || s.Mounts[1].Destination != "/dev" || s.Mounts[1].Type != "bind" || s.Mounts[2].Destination != "/dev/pts" {
		t.Errorf("mounts %+v", s.Mounts)
	}
	if last := s.Mounts[len(s.Mounts)-1]; last.Destination != "/data" {
		t.Errorf("last is %+v", last)
	}
	if options[0] = "changed"; s.Mounts[1].Options[0] != "rbind" {
		t.Error("options are the caller's")
	}
}

// TestHostNetworkFiles: the host's files come in read-only, but not over what the user mounted there.
func TestHostNetworkFiles(t *testing.T) {
	own := specs.Mount{Destination: "/etc/hosts", Type: "bind", Source: "/dev/null", Options: []string{"rbind"}}
	s := apply(t, Mounts(own), HostNetwork(), HostNetwork())
	var resolv, hosts []specs.Mount
	for _, m := range s.Mounts {
		switch m.Destination {
		case "/etc/resolv.conf":
			resolv = append(resolv, m)
		case "/etc/hosts":
			hosts = append(hosts, m)
		}
	}
	if !reflect.DeepEqual(hosts, []specs.Mount{own}) {
		t.Errorf("hosts %+v", hosts)
	}
	if st, err := os.Stat("/etc/resolv.conf"); err == nil && st.Mode().IsRegular() && (len(resolv) != 1 || !slices.Contains(resolv[0].Options, "ro")) {
		t.Errorf("resolv.conf %+v", resolv)
	}
}

func FuzzParseMount(f *testing.F) {
	for _, s := range []string{"type=bind,src=/a,dst=/b,options=rbind:ro", `"src=/a,b",dst=/b`, "type=tmpfs,dst=/t", "", ",,", `"`, "=", "dst=/b,options=bind,src=/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := ParseMount(s)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("error %v", err)
			}
			return
		}
		if !path.IsAbs(m.Destination) || path.Clean(m.Destination) != m.Destination || m.Destination == "/" || m.Type == "" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			t.Errorf("mount %+v", m)
		}
		// What was parsed is what Mounts takes.
		if err := Apply(&specs.Spec{}, Mounts(m)); err != nil {
			t.Error(err)
		}
	})
}

func FuzzParseRlimit(f *testing.F) {
	for _, s := range []string{"nofile=1024:2048", "RLIMIT_CORE=unlimited", "nofile", "=", "nproc=-1:-1", "cpu=1:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRlimit(s)
		if err == nil && (r.Soft > r.Hard || !strings.HasPrefix(r.Type, "RLIMIT_")) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}
