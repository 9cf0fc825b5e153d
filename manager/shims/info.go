package shims

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// describing is how long a shim binary may take to describe itself.
const describing = 10 * time.Second

// Describe runs the shim binary of a runtime with -info, which makes it say what it and its OCI runtime can do. Errors
// are those of Resolve, and NotImplemented for a shim that does not know -info.
func (m *Manager) Describe(ctx context.Context, runtime string, options *anypb.Any) (*types.RuntimeInfo, error) {
	binary, _, err := m.Resolve(runtime)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, describing)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-info")
	if options != nil {
		in, err := proto.Marshal(options)
		if err != nil {
			return nil, fmt.Errorf("runtime options: %w", err)
		}
		cmd.Stdin = bytes.NewReader(in)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s -info: %w: %s: %w", binary, err, bytes.TrimSpace(stderr.Bytes()), errdefs.ErrNotImplemented)
	}
	info := &types.RuntimeInfo{}
	if err := proto.Unmarshal(out, info); err != nil {
		return nil, fmt.Errorf("%s -info: %w: %w", binary, err, errdefs.ErrNotImplemented)
	}
	return info, nil
}
