package registry

import (
	"testing"

	"github.com/managerd/managerd/manager/config"
)

// TestDefaults: what the configuration says without a file is what holds without a configuration.
func TestDefaults(t *testing.T) {
	c, bare := config.Default().Registry, New(Config{}).cfg
	if config.Delay(c.DialTimeout) != bare.DialTimeout || config.Delay(c.StallTimeout) != bare.StallTimeout || config.Delay(c.MaxRetryAfter) != bare.MaxRetryAfter ||
		config.Delay(c.BreakFor) != bare.BreakFor || c.Attempts != bare.Attempts || int64(c.ManifestLimit) != bare.ManifestLimit || int64(c.ChunkSize) != bare.ChunkSize {
		t.Errorf("%+v, %+v", c, bare)
	}
}
