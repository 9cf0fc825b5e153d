package service

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
)

// TestDecodeOptions: both forms of the options mean the same, and what cannot be honoured is a sentence.
func TestDecodeOptions(t *testing.T) {
	file := filepath.Join(t.TempDir(), "options.toml")
	if err := os.WriteFile(file, []byte("SystemdCgroup = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		in   any
		want *options.Options
		kind error
		says string
	}{
		{"runc", &options.Options{BinaryName: "crun", IoUid: 7}, &options.Options{BinaryName: "crun", IoUid: 7}, nil, ""},
		{"body", &runtimeoptions.Options{TypeUrl: "containerd.runc.v1.Options", ConfigBody: []byte("BinaryName = \"crun\"\nIoGid = 8\nRoot = \"/r\"\n")},
			&options.Options{BinaryName: "crun", IoGid: 8, Root: "/r"}, nil, ""},
		{"file", &runtimeoptions.Options{ConfigPath: file}, &options.Options{SystemdCgroup: true}, nil, ""},
		{"nothing", &runtimeoptions.Options{}, &options.Options{}, nil, ""},
		{"missing file", &runtimeoptions.Options{ConfigPath: file + "x"}, nil, errdefs.ErrInvalidArgument, file + "x"},
		{"unknown key", &runtimeoptions.Options{ConfigBody: []byte("Nonsense = 1")}, nil, errdefs.ErrInvalidArgument, "ConfigBody"},
		//lint:ignore SA1019 a client may send it all the same
		{"task api", &options.Options{TaskApiAddress: "unix:///x"}, nil, errdefs.ErrNotImplemented, "TaskApiAddress"},
		//lint:ignore SA1019 a client may send it all the same
		{"task api version", &options.Options{TaskApiVersion: 3}, nil, errdefs.ErrNotImplemented, "TaskApiVersion"},
		{"other type", &options.CheckpointOptions{}, nil, errdefs.ErrInvalidArgument, "not containerd.runc.v1.Options"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in, err := typeurl.MarshalAnyToProto(c.in)
			if err != nil {
				t.Fatal(err)
			}
			got, err := decodeOptions(in)
			if c.kind != nil {
				if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), c.kind.Error()) {
					t.Fatalf("error is %v, want one of kind %q that says %q", err, c.kind, c.says)
				}
				return
			}
			if err != nil || !proto.Equal(got, c.want) {
				t.Fatalf("got %v, %v; want %v", got, err, c.want)
			}
		})
	}
}

// TestMissingRuntime: a runtime that is not installed is named, and the option that asks for it.
func TestMissingRuntime(t *testing.T) {
	for _, binary := range []string{"no-such-runtime", "/nonexistent/crun"} {
		_, err := NewEngine(engine.Config{}, binary)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(fmt.Sprint(err), binary) || !strings.Contains(fmt.Sprint(err), "BinaryName") {
			t.Errorf("error for %s is %v", binary, err)
		}
	}
}
