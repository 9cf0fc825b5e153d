package server

import (
	"reflect"
	"testing"
	"time"

	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/registry"
)

// TestRegistryConfig: every setting of registries gets to their client.
func TestRegistryConfig(t *testing.T) {
	cfg := config.Default()
	cfg.Transfer = config.Transfer{ConfigPath: "/c:/d"}
	cfg.Registry = config.Registry{
		ConfigPath: "/a:/b", DockerConfig: "/e", DialTimeout: "1s", StallTimeout: "2s", MaxRetryAfter: "3s", BreakFor: "4s",
		Attempts: 5, ManifestLimit: 6, ChunkSize: 7,
		Old: config.OldRegistry{
			Mirrors: map[string]config.OldMirror{"x": {Endpoint: []string{"https://m"}}},
			Auths:   map[string]config.OldAuth{"y": {Username: "u", Password: "p"}},
			Configs: map[string]config.OldHost{"z": {Auth: &config.OldAuth{IdentityToken: "i"}, TLS: &config.OldTLS{CAFile: "/ca", CertFile: "/c", KeyFile: "/k", InsecureSkipVerify: true}}},
			Headers: map[string][]string{"X": {"1"}},
		},
	}
	got := (&Server{cfg: cfg}).registryConfig()
	want := registry.Config{
		ConfigPath: []string{"/a", "/b", "/c", "/d"}, DockerConfig: "/e", Attempts: 5, ManifestLimit: 6, ChunkSize: 7,
		DialTimeout: time.Second, StallTimeout: 2 * time.Second, MaxRetryAfter: 3 * time.Second, BreakFor: 4 * time.Second,
		Legacy: registry.Legacy{
			Mirrors: map[string][]string{"x": {"https://m"}},
			Auths:   map[string]registry.LegacyAuth{"y": {Username: "u", Password: "p"}, "z": {IdentityToken: "i"}},
			TLS:     map[string]registry.LegacyTLS{"z": {CAFile: "/ca", CertFile: "/c", KeyFile: "/k", InsecureSkipVerify: true}},
			Headers: map[string][]string{"X": {"1"}},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nnot\n%+v", got, want)
	}
}
