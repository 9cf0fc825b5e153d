package thinpool

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestStatus(t *testing.T) {
	for out, want := range map[string]error{
		"1 120/4096 500/65536 - rw discard_passdown error_if_no_space - 1024":                  nil,
		"1 120/4096 65536/65536 - rw discard_passdown queue_if_no_space - 1024":                errdefs.ErrResourceExhausted,
		"1 120/4096 65530/65536 - out_of_data_space discard_passdown error_if_no_space - 1024": errdefs.ErrResourceExhausted,
		"1 4096/4096 500/65536 - ro discard_passdown error_if_no_space needs_check 1024":       errdefs.ErrResourceExhausted,
		"1 4096/4096 500/65536 - rw discard_passdown error_if_no_space - 1024":                 errdefs.ErrResourceExhausted,
		"Fail": errdefs.ErrUnavailable,
	} {
		p, err := parse("tank", out)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Usable()
		if !errors.Is(err, want) || err != nil && !strings.Contains(err.Error(), "tank") {
			t.Errorf("%s: %v, want %v", out, err, want)
		}
	}
	for _, bad := range []string{"", "8:0 0", "1 a/b 1/2 - rw", "1 1 1/2 - rw"} {
		if _, err := parse("tank", bad); err == nil {
			t.Errorf("%q is the status of a pool", bad)
		}
	}
}

func TestFull(t *testing.T) {
	for _, path := range []string{"/dev/null", "/dev/mapper/no-such-device", t.TempDir()} {
		if err := Full(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}
