package boot

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/service"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/version"
)

// What containerd 2.x calls us when it asks, and the type of a runtime's features.
const (
	runtimeName  = "io.containerd.runc.v2"
	featuresType = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
)

// maxOptions is the most bytes of options that are read from stdin.
const maxOptions = 1 << 20

// Annotations of a RuntimeInfo: the runtime behind the shim where the options name one (BinaryName), by its path, and what it
// prints of its version.
const (
	annotationRuntime        = "io.managerd.shim.runtime"
	annotationRuntimeVersion = "io.managerd.shim.runtime.version"
)

// infoPatience is how long another runtime may take to say what it is.
const infoPatience = 10 * time.Second

// info prints a serialised types.RuntimeInfo: containerd 2.x runs "-info" with the runtime's options, an Any, on stdin. The
// features are those of the runtime that the options name.
func info(stdin io.Reader, stdout io.Writer) error {
	in, err := io.ReadAll(io.LimitReader(stdin, maxOptions))
	if err != nil {
		return fmt.Errorf("cannot read runtime options: %w", err)
	}
	about := &types.RuntimeInfo{
		Name: runtimeName, Version: &types.RuntimeVersion{Version: version.Version, Revision: version.Revision},
		Annotations: map[string]string{shimapi.AnnotationServe: "true"},
	}
	if len(in) > 0 {
		about.Options = &anypb.Any{}
		if err := proto.Unmarshal(in, about.Options); err != nil {
			return fmt.Errorf("cannot read runtime options: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), infoPatience)
	defer cancel()
	runtime, err := service.Describe(ctx, about.Options)
	if err != nil {
		return err
	}
	if runtime.Path != "" {
		about.Annotations[annotationRuntime], about.Annotations[annotationRuntimeVersion] = runtime.Path, runtime.Version
	}
	if runtime.Features != nil {
		features, err := json.Marshal(runtime.Features)
		if err != nil {
			return err
		}
		about.Features = &anypb.Any{TypeUrl: featuresType, Value: features}
	}
	out, err := proto.Marshal(about)
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}
