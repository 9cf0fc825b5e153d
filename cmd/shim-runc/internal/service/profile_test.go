package service_test

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// TestProfile: profiles are streamed, while execs run; what cannot be had is refused.
func TestProfile(t *testing.T) {
	f := running(t, "profile", nil)
	get := func(r *shim.ProfileRequest) ([]byte, error) {
		stream, err := f.Shim().Profile(ctx, r)
		var out bytes.Buffer
		for err == nil {
			var part *shim.ProfileResponse
			if part, err = stream.Recv(); err == nil {
				out.Write(part.Data)
			}
		}
		if errors.Is(err, io.EOF) {
			return out.Bytes(), nil
		}
		return nil, shimapi.FromWire(err)
	}
	for name, begins := range map[string]string{"heap": "\x1f\x8b", "goroutine": "\x1f\x8b", "profile": "\x1f\x8b", "trace": "go 1."} {
		done := make(chan uint32, 1)
		go func() { done <- f.runExec(name, nil, "sh", "-c", "exit 3") }()
		got, err := get(&shim.ProfileRequest{Name: name, DurationNano: int64(200 * time.Millisecond)})
		if err != nil || !bytes.HasPrefix(got, []byte(begins)) {
			t.Errorf("%s: %.20q, %v", name, got, err)
		}
		if s := <-done; s != 3 {
			t.Errorf("%s: status %d of an exec", name, s)
		}
	}
	if _, err := get(&shim.ProfileRequest{Name: "nothing"}); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	if got, err := get(&shim.ProfileRequest{Name: "heap", DurationNano: -1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%.20q, %v", got, err)
	}
	// There are samples of what was allocated meanwhile.
	sampled := make(chan uint32, 1)
	go func() { sampled <- f.runExec("sampled", nil, "true") }()
	if got, err := get(&shim.ProfileRequest{Name: "allocs", Debug: 1, DurationNano: int64(time.Second)}); err != nil || !bytes.Contains(got, []byte("/8192")) || !bytes.Contains(got, []byte("service.(*Service)")) {
		t.Errorf("%.2000s, %v", got, err)
	}
	if s := <-sampled; s != 0 {
		t.Errorf("status %d of an exec", s)
	}
	for _, bad := range []time.Duration{0, -1, time.Hour} {
		if _, err := get(&shim.ProfileRequest{Name: "trace", DurationNano: int64(bad)}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
