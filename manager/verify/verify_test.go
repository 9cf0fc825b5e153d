package verify

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var target = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("x"), Size: 1}

func dir(t *testing.T, scripts map[string]string) string {
	t.Helper()
	d := t.TempDir()
	for name, s := range scripts {
		if err := os.WriteFile(filepath.Join(d, name), []byte("#!/bin/sh\n"+s+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestVerify(t *testing.T) {
	for name, c := range map[string]struct {
		scripts map[string]string
		max     int
		class   func(error) bool // nil: allowed
		want    string
	}{
		"none":            {nil, 10, nil, ""},
		"all allow":       {map[string]string{"a": "echo fine", "b": "exit 0"}, 10, nil, ""},
		"the second not":  {map[string]string{"a": "exit 0", "b": "echo 'no signature'; exit 2"}, 10, errdefs.IsPermissionDenied, "image verifier b: it does not allow example.com/a:1 with digest " + target.Digest.String() + " (exit status 2): no signature"},
		"more than max":   {map[string]string{"a": "exit 0", "b": "exit 1"}, 1, nil, ""},
		"no maximum":      {map[string]string{"a": "exit 0", "b": "exit 1"}, -1, errdefs.IsPermissionDenied, "verifier b"},
		"is killed":       {map[string]string{"a": "kill -9 $$"}, 10, errdefs.IsFailedPrecondition, "signal: killed"},
		"says a lot":      {map[string]string{"a": "head -c 1000000 /dev/zero | tr '\\0' x; exit 1"}, 10, errdefs.IsPermissionDenied, "xxx ..."},
		"leaves a child":  {map[string]string{"a": "sleep 1000 & exit 0"}, 10, nil, ""},
		"reads no input":  {map[string]string{"a": "exec <&-; exit 0"}, 10, nil, ""},
		"hangs with more": {map[string]string{"hang": "sleep 1000 & wait"}, 10, errdefs.IsDeadlineExceeded, "verifier hang: it took longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			limit := time.Minute
			if c.scripts["hang"] != "" {
				limit = 200 * time.Millisecond
			}
			err := New(Config{Dir: dir(t, c.scripts), Max: c.max, Timeout: limit}).Verify(t.Context(), "example.com/a:1", target)
			if c.class == nil && err != nil || c.class != nil && (err == nil || !c.class(err) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%.300v", err)
			}
			if err != nil && len(err.Error()) > maxOutput+1000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
	t.Run("not a program", func(t *testing.T) {
		d := t.TempDir()
		if err := os.WriteFile(filepath.Join(d, "README"), []byte("hello"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := New(Config{Dir: d, Max: 10, Timeout: time.Minute}).Verify(t.Context(), "a", target); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		if err := New(Config{Dir: "/nowhere", Max: 10, Timeout: time.Minute}).Verify(t.Context(), "a", target); err != nil {
			t.Error(err)
		}
	})
}

// TestProtocol: a verifier is told what containerd tells one.
func TestProtocol(t *testing.T) {
	out := t.TempDir()
	d := dir(t, map[string]string{"a": `printf '%s\n' "$@" >` + out + `/args; cat >` + out + `/stdin`})
	if err := New(Config{Dir: d, Max: 10, Timeout: time.Minute}).Verify(t.Context(), "example.com/a:1", target); err != nil {
		t.Fatal(err)
	}
	want := "-name\nexample.com/a:1\n-digest\n" + target.Digest.String() + "\n-stdin-media-type\napplication/vnd.oci.descriptor.v1+json\n"
	if got, err := os.ReadFile(filepath.Join(out, "args")); string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	data, err := os.ReadFile(filepath.Join(out, "stdin"))
	var got ocispec.Descriptor
	if err != nil || json.Unmarshal(data, &got) != nil || got.Digest != target.Digest || got.MediaType != target.MediaType || got.Size != target.Size {
		t.Errorf("%q, %v", data, err)
	}
}
