package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

// runcRuntime is the runtime whose options are runc's.
const runcRuntime = "io.containerd.runc.v2"

// runtimeInfo is what ctr prints of a runtime.
type runtimeInfo struct {
	Name    string
	Version struct {
		Version, Revision string
	}
	Options     any
	Features    json.RawMessage
	Annotations map[string]string
}

func (c *cli) pluginsInspectRuntime() *cobra.Command {
	var runtime, configPath string
	var o options.Options
	cmd := &cobra.Command{
		Use: "inspect-runtime [flags]", Short: "Print what a runtime is and can do, as JSON", Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if runtime != runcRuntime && (o.BinaryName != "" || o.Root != "") {
				return misused(cmd, "--runc-binary and --runc-root are options of %s, not of %s", runcRuntime, runtime)
			}
			request := &types.RuntimeRequest{RuntimePath: runtime}
			var err error
			switch {
			case runtime == runcRuntime:
				request.Options, err = typeurl.MarshalAnyToProto(&o)
			case configPath != "":
				request.Options, err = typeurl.MarshalAnyToProto(&runtimeoptions.Options{ConfigPath: configPath})
			}
			if err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				info, err := describeRuntime(ctx, cl, request)
				if err != nil {
					return fmt.Errorf("cannot ask runtime %s what it is: %w", runtime, err)
				}
				return table.PrintJSON(c.out, info)
			})
		},
	}
	cmd.Flags().StringVar(&runtime, "runtime", runcRuntime, "`name` of the runtime, or the path of its shim")
	cmd.Flags().StringVar(&configPath, "runtime-config-path", "", "`file` with the configuration of another runtime than "+runcRuntime)
	cmd.Flags().StringVar(&o.BinaryName, "runc-binary", "", "`path` of another OCI runtime, for "+runcRuntime)
	cmd.Flags().StringVar(&o.Root, "runc-root", "", "`directory` in which that keeps its state")
	refused(cmd, "a runtime is asked without a cgroup, which this is about; ctr refuses it, too", "runc-systemd-cgroup")
	return cmd
}

func describeRuntime(ctx context.Context, cl *client.Client, request *types.RuntimeRequest) (out runtimeInfo, err error) {
	asked, err := typeurl.MarshalAnyToProto(request)
	if err != nil {
		return out, err
	}
	r, err := cl.Introspection.PluginInfo(ctx, &introspectionapi.PluginInfoRequest{Type: "io.containerd.runtime.v2", ID: "task", Options: asked})
	if err != nil {
		return out, err
	}
	var info types.RuntimeInfo
	if r.Extra == nil {
		return out, errors.New("the daemon does not say")
	}
	if err := proto.Unmarshal(r.Extra.GetValue(), &info); err != nil {
		return out, err
	}
	out.Name, out.Annotations = info.Name, info.Annotations
	out.Version.Version, out.Version.Revision = info.Version.GetVersion(), info.Version.GetRevision()
	if out.Options, err = decoded(info.Options); err != nil {
		return out, err
	}
	if info.Features != nil { // of the runtime spec, which has them as JSON
		out.Features = info.Features.GetValue()
	}
	return out, nil
}

// decoded is what options are, if this program knows their type; else their type and bytes.
func decoded(a *anypb.Any) (any, error) {
	if a == nil {
		return nil, nil
	}
	v, err := typeurl.UnmarshalAny(a)
	if errors.Is(err, typeurl.ErrNotFound) {
		return map[string]any{"type_url": a.TypeUrl, "value": a.Value}, nil
	}
	return v, err
}
