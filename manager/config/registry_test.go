package config

import (
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// TestRegistry: host directories and CRI's old registry configuration, in files of either version; what is old is said.
func TestRegistry(t *testing.T) {
	body := `
[plugins."SECTION".registry]
config_path = "/a:/b"
[plugins."SECTION".registry.mirrors]
[plugins."SECTION".registry.mirrors."docker.io"]
endpoint = ["https://m", "http://n"]
[plugins."SECTION".registry.configs."m".auth]
username = "u"
password = "p"
[plugins."SECTION".registry.configs."m".tls]
insecure_skip_verify = true
ca_file = "/ca"
[plugins."SECTION".registry.auths."https://q"]
auth = "dTpw"
identitytoken = "i"
[plugins."SECTION".registry.headers]
X-One = ["1"]
X-Two = "2"
[plugins."io.managerd.registry.v1.client"]
stall_timeout = "5s"
attempts = 7
`
	want := Default()
	want.Registry.ConfigPath, want.Registry.StallTimeout, want.Registry.Attempts = "/a:/b", "5s", 7
	want.Registry.Old = OldRegistry{
		Mirrors: map[string]OldMirror{"docker.io": {Endpoint: []string{"https://m", "http://n"}}},
		Configs: map[string]OldHost{"m": {Auth: &OldAuth{Username: "u", Password: "p"}, TLS: &OldTLS{InsecureSkipVerify: true, CAFile: "/ca"}}},
		Auths:   map[string]OldAuth{"https://q": {Auth: "dTpw", IdentityToken: "i"}},
		Headers: map[string][]string{"X-One": {"1"}, "X-Two": {"2"}},
	}
	for version, section := range map[string]string{"version = 2\n": criPlugin, "version = 3\n": criImages} {
		got, warnings, err := Load(write(t, t.TempDir(), "config.toml", version+strings.ReplaceAll(body, "SECTION", section)))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%s: %+v, %v", section, got, err)
		}
		if len(warnings) != 4 {
			t.Errorf("%v", warnings)
		}
		for i, w := range warnings {
			if wantLine := []int{5, 8, 14, 17}[i]; w.Line != wantLine || !strings.Contains(w.Text, "hosts.toml") {
				t.Errorf("%s, not in line %d", w, wantLine)
			}
		}
		again, warnings, err := Load(write(t, t.TempDir(), "again.toml", text(t, got)))
		if err != nil || len(warnings) != 4 || !reflect.DeepEqual(again, want) {
			t.Errorf("written and read: %+v, %v, %v", again, warnings, err)
		}
	}
	if got := Changed(want, Default()); len(got) != 7 {
		t.Errorf("changed: %q", got)
	}
	for file, words := range map[string]string{
		"[plugins.\"io.containerd.cri.v1.images\".registry.mirrors.a]\nendpoint = 3\n":    "2: plugins.\"io.containerd.cri.v1.images\".registry.mirrors: ",
		"[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfigs = 3\n":                 "3: plugins.\"io.containerd.grpc.v1.cri\".registry.configs: ",
		"[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = 3\n":             "config_path must be a string",
		"[plugins.\"io.managerd.registry.v1.client\"]\nattempts = 0\n":                    "attempts 0 must be at least 1",
		"[plugins.\"io.managerd.registry.v1.client\"]\nstall_timeout = \"0s\"\n":          "stall_timeout must be longer than nothing",
		"[plugins.\"io.managerd.registry.v1.client\"]\ndocker_config = \"config.json\"\n": "must be an absolute path",
	} {
		if _, _, err := Load(write(t, t.TempDir(), "config.toml", "version = 2\n"+file)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), words) {
			t.Errorf("%v\nhas no %q", err, words)
		}
	}
}
