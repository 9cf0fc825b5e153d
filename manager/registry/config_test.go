package registry

import (
	"reflect"
	"testing"
	"time"

	"github.com/managerd/managerd/manager/config"
)

func TestFromConfig(t *testing.T) {
	d := FromConfig(config.Default().Registry, nil)
	d.Legacy, d.ConfigPath = Legacy{}, nil
	// What stands in the configuration by default is what holds without one.
	if bare := New(Config{}).cfg; d.DialTimeout != bare.DialTimeout || d.StallTimeout != bare.StallTimeout || d.MaxRetryAfter != bare.MaxRetryAfter ||
		d.BreakFor != bare.BreakFor || d.Attempts != bare.Attempts || d.ManifestLimit != bare.ManifestLimit || d.ChunkSize != bare.ChunkSize {
		t.Errorf("%+v, %+v", d, bare)
	}
	c := config.Registry{ConfigPath: "/a:/b", StallTimeout: "2s", Old: config.OldRegistry{
		Mirrors: map[string]config.OldMirror{"x": {Endpoint: []string{"https://m"}}},
		Auths:   map[string]config.OldAuth{"y": {Username: "u", Password: "p"}},
		Configs: map[string]config.OldHost{"z": {Auth: &config.OldAuth{IdentityToken: "i"}, TLS: &config.OldTLS{CAFile: "/ca", InsecureSkipVerify: true}}},
	}}
	got := FromConfig(c, nil)
	want := Legacy{
		Mirrors: map[string][]string{"x": {"https://m"}},
		Auths:   map[string]LegacyAuth{"y": {Username: "u", Password: "p"}, "z": {IdentityToken: "i"}},
		TLS:     map[string]LegacyTLS{"z": {CAFile: "/ca", InsecureSkipVerify: true}},
	}
	if !reflect.DeepEqual(got.Legacy, want) || !reflect.DeepEqual(got.ConfigPath, []string{"/a", "/b"}) || got.StallTimeout != 2*time.Second {
		t.Errorf("%+v", got)
	}
}
