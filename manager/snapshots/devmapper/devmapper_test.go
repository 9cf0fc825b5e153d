package devmapper

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestLeftOut(t *testing.T) {
	if _, err := New(t.TempDir(), Options{FSType: "ext4", BaseSize: 1 << 30}); !errors.Is(err, errdefs.ErrNotImplemented) || !strings.Contains(err.Error(), "pool_name") {
		t.Errorf("without a pool: %v", err)
	}
}
