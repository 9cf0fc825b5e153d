package api

import (
	"testing"

	api "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// TestCheckpointOf: what a task is restored from is the directory of its options before the checkpoint in the content store.
func TestCheckpointOf(t *testing.T) {
	encode := func(m proto.Message) *anypb.Any {
		a, err := typeurl.MarshalAnyToProto(m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	blob := &types.Descriptor{Digest: "sha256:x"}
	for name, c := range map[string]struct {
		r       *api.CreateTaskRequest
		dir     string
		unpacks bool
		is      func(error) bool
	}{
		"nothing":       {r: &api.CreateTaskRequest{}},
		"other options": {r: &api.CreateTaskRequest{Options: encode(&options.Options{SystemdCgroup: true})}},
		"unknown type":  {r: &api.CreateTaskRequest{Options: &anypb.Any{TypeUrl: "no.such.Type"}, Checkpoint: blob}, unpacks: true},
		"blob":          {r: &api.CreateTaskRequest{Checkpoint: blob}, unpacks: true},
		"directory":     {r: &api.CreateTaskRequest{Options: encode(&options.Options{CriuImagePath: "/images"})}, dir: "/images"},
		"both":          {r: &api.CreateTaskRequest{Options: encode(&options.Options{CriuImagePath: "/images"}), Checkpoint: blob}, dir: "/images"},
		"malformed": {r: &api.CreateTaskRequest{Options: &anypb.Any{TypeUrl: encode(&options.Options{}).TypeUrl, Value: []byte{0xff}}},
			is: errdefs.IsInvalidArgument},
	} {
		dir, unpack, err := NewTasks(nil, nil, nil, "").checkpointOf(c.r)
		if dir != c.dir || (unpack != nil) != c.unpacks || (err != nil) != (c.is != nil) || c.is != nil && !c.is(err) {
			t.Errorf("%s: %q, unpacks %v, %v", name, dir, unpack != nil, err)
		}
	}
}
