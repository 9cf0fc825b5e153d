package service

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	shim "github.com/managerd/managerd/protos/shim/v1"
)

// FuzzOptions: whatever a client sends as runtime options, it is options, or refused with a reason.
func FuzzOptions(f *testing.F) {
	for _, m := range []proto.Message{
		&options.Options{NoPivotRoot: true, BinaryName: "crun", Root: "/x", IoUid: 1 << 31},
		&runtimeoptions.Options{ConfigBody: []byte("BinaryName = \"x\"\nSystemdCgroup = true")}, &runtimeoptions.Options{ConfigBody: []byte("[a]\nb=")},
		&runtimeoptions.Options{}, &shim.ExecSpec{},
	} {
		any, err := typeurl.MarshalAnyToProto(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(any.TypeUrl, any.Value)
		f.Add(any.TypeUrl, any.Value[:len(any.Value)/2])
	}
	f.Add("", []byte("x"))
	f.Add("no/such.Type", []byte{0xff})
	f.Fuzz(func(t *testing.T, url string, value []byte) {
		var named runtimeoptions.Options
		if proto.Unmarshal(value, &named) == nil && named.ConfigPath != "" {
			return // what is fuzzed runs as root, and opens no files of the machine
		}
		opts, err := decodeOptions(&anypb.Any{TypeUrl: url, Value: value})
		if (opts == nil) == (err == nil) || err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("%v beside %v", opts, err)
		}
	})
}

// FuzzExecSpec: whatever a client sends as what is to be executed, it is a process and a time limit, or an invalid argument.
func FuzzExecSpec(f *testing.F) {
	own := string((&shim.ExecSpec{}).ProtoReflect().Descriptor().FullName())
	for _, process := range []string{`{"args":["true"]}`, `{"args":"true"}`, `{`, ``, `null`, `[]`, `{"rlimits":[{}],"capabilities":null}`} {
		f.Add("types.containerd.io/opencontainers/runtime-spec/1/Process", []byte(process))
		for _, nanos := range []int64{0, 1, -1, 1 << 62} {
			value, err := proto.Marshal(&shim.ExecSpec{Process: &anypb.Any{Value: []byte(process)}, TimeoutNano: nanos})
			if err != nil {
				f.Fatal(err)
			}
			f.Add(own, value)
			f.Add("type.googleapis.com/"+own, value[:len(value)/2])
		}
	}
	f.Fuzz(func(t *testing.T, url string, value []byte) {
		spec, timeout, err := decodeExec(&anypb.Any{TypeUrl: url, Value: value})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || spec != nil {
				t.Errorf("%v beside %v", spec, err)
			}
			return
		}
		if spec == nil || timeout < 0 || timeout > 0 && !strings.HasSuffix(url, own) {
			t.Errorf("%v, %v", spec, timeout)
		}
		if _, err := json.Marshal(spec); err != nil { // as it is kept
			t.Error(err)
		}
	})
}
