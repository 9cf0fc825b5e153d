package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	api "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/launch"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/shimapi"
)

// sandboxer is the controller that mctl's own sandboxes have.
const sandboxer = "shim"

// specType is the type of an OCI runtime spec in an Any.
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

func (c *cli) sandboxesCommand() *cobra.Command {
	return group("sandboxes", "Manage sandboxes: namespaces that containers share", []string{"sandbox", "sb", "s"},
		c.sandboxesRun(), c.sandboxesLs(), c.sandboxesInfo(), c.sandboxesStop(), c.sandboxesWait(), c.sandboxesRm(), c.sandboxesPing(), c.sandboxesMetrics())
}

// ofSandbox says what to do about an error about a sandbox.
func ofSandbox(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w; `mctl sandboxes ls` lists those there are", err)
	}
	return err
}

// sandboxFlags are those that describe a sandbox.
type sandboxFlags struct {
	runtime, netns, hostname, shm, cgroup string
	labels, sysctls                       []string
	pid, netHost                          bool
}

func (f *sandboxFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.runtime, "runtime", "io.containerd.runc.v2", "`name` or absolute path of the runtime")
	fs.StringVar(&f.netns, "netns", "", "`path` of the network namespace, as `ip netns` makes them (default: a new one, with lo)")
	fs.BoolVar(&f.netHost, "net-host", false, "hold no network namespace: members stay in the host's network")
	fs.BoolVar(&f.pid, "pid", false, "share a pid namespace, with an init that reaps")
	fs.StringVar(&f.hostname, "hostname", "", "host `name` of all members")
	fs.StringVar(&f.shm, "shm-size", "", "size of the shared /dev/shm in `bytes`, or as 64MiB")
	fs.StringArrayVar(&f.sysctls, "sysctl", nil, "`NAME=VALUE` of the network or ipc namespace")
	fs.StringVar(&f.cgroup, "cgroup", "", "`path` of the cgroup above those of the members (default: /NAMESPACE/ID)")
	fs.StringArrayVar(&f.labels, "label", nil, "label `KEY=VALUE` for the sandbox")
}

// spec is what the flags, or a file, say.
func (f *sandboxFlags) spec(namespace, id, file string) ([]byte, error) {
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if !json.Valid(data) {
			return nil, fmt.Errorf("%s is no JSON: %w", file, errdefs.ErrInvalidArgument)
		}
		return data, nil
	}
	s := &specs.Spec{Version: specs.Version, Hostname: f.hostname, Linux: &specs.Linux{CgroupsPath: f.cgroup}}
	if f.cgroup == "" {
		s.Linux.CgroupsPath = path.Join("/", namespace, id)
	}
	add := func(is bool, kind specs.LinuxNamespaceType) {
		if is {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind})
		}
	}
	add(!f.netHost, specs.NetworkNamespace)
	add(true, specs.IPCNamespace)
	add(true, specs.UTSNamespace)
	add(f.pid, specs.PIDNamespace)
	var err error
	if s.Linux.Sysctl, err = launch.KeyValues(f.sysctls); err != nil {
		return nil, fmt.Errorf("--sysctl: %w", err)
	}
	if f.shm != "" {
		n, err := units.RAMInBytes(f.shm)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("--shm-size %q is no number of bytes, as 67108864 or 64MiB: %w", f.shm, errdefs.ErrInvalidArgument)
		}
		s.Mounts = []specs.Mount{{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{fmt.Sprintf("size=%d", n)}}}
	}
	return json.Marshal(s)
}

func (c *cli) sandboxesRun() *cobra.Command {
	f := &sandboxFlags{}
	cmd := &cobra.Command{
		Use: "run [flags] [SPEC.json] ID", Aliases: []string{"create", "c", "r"}, Short: "Make a sandbox and start it", Args: args(1, 2),
		Long: "Make a sandbox and start it. SPEC.json is an OCI runtime spec with what it is to hold: see docs/sandboxes.md.",
		Example: `  mctl sandboxes run --hostname pod --pid pod1
  mctl run -d --sandbox pod1 docker.io/library/busybox:latest one sleep 1000`,
		RunE: func(cmd *cobra.Command, given []string) error {
			id, file := given[len(given)-1], ""
			if len(given) == 2 {
				file = given[0]
			}
			if err := identifiers.Validate(id); err != nil {
				return misused(cmd, "sandbox id: %w", err)
			}
			labels, err := launch.KeyValues(f.labels)
			if err != nil {
				return misused(cmd, "--label: %w", err)
			}
			if f.netHost && f.netns != "" {
				return misused(cmd, "--net-host and --netns exclude each other")
			}
			spec, err := f.spec(c.namespace, id, file)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			b := &types.Sandbox{
				SandboxID: id, Runtime: &types.Sandbox_Runtime{Name: f.runtime}, Spec: &anypb.Any{TypeUrl: specType, Value: spec}, Labels: labels, Sandboxer: sandboxer,
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := runSandbox(ctx, cl, b, f.netns)
				if err != nil {
					return err
				}
				if c.format() == table.JSON {
					return table.PrintJSON(c.out, map[string]any{"id": id, "pid": r.Pid, "address": r.Address})
				}
				_, err = fmt.Fprintln(c.out, id)
				return err
			})
		},
	}
	f.add(cmd)
	return cmd
}

// runSandbox makes and starts a sandbox; on an error nothing is left of it.
func runSandbox(ctx context.Context, cl *client.Client, b *types.Sandbox, netns string) (_ *api.ControllerStartResponse, err error) {
	id := b.SandboxID
	if _, err := cl.Sandboxes.Create(ctx, &api.StoreCreateRequest{Sandbox: b}); err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
		defer cancel()
		if _, serr := cl.SandboxController.Shutdown(undo, &api.ControllerShutdownRequest{SandboxID: id, Sandboxer: b.Sandboxer}); serr != nil && !errdefs.IsNotFound(serr) {
			err = errors.Join(err, serr)
		}
		if _, derr := cl.Sandboxes.Delete(undo, &api.StoreDeleteRequest{SandboxID: id}); derr != nil {
			err = errors.Join(err, derr)
		}
	}()
	if _, err := cl.SandboxController.Create(ctx, &api.ControllerCreateRequest{SandboxID: id, Sandbox: b, NetnsPath: netns, Sandboxer: b.Sandboxer}); err != nil {
		return nil, err
	}
	return cl.SandboxController.Start(ctx, &api.ControllerStartRequest{SandboxID: id, Sandboxer: b.Sandboxer})
}

type sandboxRow struct {
	ID        string            `json:"id"`
	Created   time.Time         `json:"created_at"`
	Runtime   string            `json:"runtime"`
	Sandboxer string            `json:"sandboxer"`
	State     string            `json:"state"`
	Pid       uint32            `json:"pid"`
	Labels    map[string]string `json:"labels,omitempty"`
}

var sandboxTable = table.Table[sandboxRow]{Columns: []table.Column[sandboxRow]{
	{Title: "ID", Cell: func(r sandboxRow) string { return r.ID }},
	{Title: "CREATED", Cell: func(r sandboxRow) string { return r.Created.Format(time.RFC3339) }},
	{Title: "RUNTIME", Cell: func(r sandboxRow) string { return r.Runtime }},
	{Title: "STATE", Cell: func(r sandboxRow) string { return r.State }},
}}

// sandboxState is how a sandbox is, in one word.
func sandboxState(ctx context.Context, cl *client.Client, b *types.Sandbox) (state string, pid uint32) {
	r, err := cl.SandboxController.Status(ctx, &api.ControllerStatusRequest{SandboxID: b.SandboxID, Sandboxer: b.Sandboxer})
	switch {
	case err != nil:
		return "unknown", 0
	case r.State == shimapi.SandboxReady:
		return "ready", r.Pid
	}
	return "notready", r.Pid
}

func (c *cli) sandboxesLs() *cobra.Command {
	var quiet bool
	var more []string
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List sandboxes",
		Example: "  mctl sandboxes ls 'labels.app==web'",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Sandboxes.List(ctx, &api.StoreListRequest{Filters: append(filters, more...)})
				if err != nil {
					return err
				}
				var rows []sandboxRow
				var ids []string
				for _, b := range r.List {
					row := sandboxRow{ID: b.SandboxID, Created: b.CreatedAt.AsTime(), Runtime: b.Runtime.GetName(), Sandboxer: b.Sandboxer, Labels: b.Labels}
					if !quiet {
						row.State, row.Pid = sandboxState(ctx, cl, b)
					}
					rows, ids = append(rows, row), append(ids, b.SandboxID)
				}
				return list(c, quiet, ids, sandboxTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	cmd.Flags().StringArrayVar(&more, "filters", nil, "a `FILTER`, as ctr has it")
	return cmd
}

// sandboxInfo is all about a sandbox.
type sandboxInfo struct {
	ID         string            `json:"id"`
	Labels     map[string]string `json:"labels,omitempty"`
	Runtime    string            `json:"runtime"`
	Sandboxer  string            `json:"sandboxer"`
	Created    time.Time         `json:"created_at"`
	Updated    time.Time         `json:"updated_at"`
	Extensions []string          `json:"extensions,omitempty"`
	State      string            `json:"state"`
	Pid        uint32            `json:"pid"`
	Address    string            `json:"address,omitempty"`
	Exited     *time.Time        `json:"exited_at,omitempty"`
	Spec       json.RawMessage   `json:"spec,omitempty"` // as it was carried out, or as it is asked for
	Info       map[string]string `json:"info,omitempty"`
}

// known asks the store, which says how a sandbox is to be asked for.
func known(ctx context.Context, cl *client.Client, id string) (*types.Sandbox, error) {
	r, err := cl.Sandboxes.Get(ctx, &api.StoreGetRequest{SandboxID: id})
	if err != nil {
		return nil, ofSandbox(err)
	}
	return r.Sandbox, nil
}

func (c *cli) sandboxesInfo() *cobra.Command {
	return &cobra.Command{
		Use: "info ID", Short: "Print all about a sandbox, as JSON", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				b, err := known(ctx, cl, given[0])
				if err != nil {
					return err
				}
				r, err := cl.SandboxController.Status(ctx, &api.ControllerStatusRequest{SandboxID: b.SandboxID, Sandboxer: b.Sandboxer, Verbose: true})
				if err != nil {
					return err
				}
				info := sandboxInfo{
					ID: b.SandboxID, Labels: b.Labels, Runtime: b.Runtime.GetName(), Sandboxer: b.Sandboxer, Created: b.CreatedAt.AsTime(), Updated: b.UpdatedAt.AsTime(),
					State: r.State, Pid: r.Pid, Address: r.Address, Info: r.Info,
				}
				info.Extensions = slices.Sorted(maps.Keys(b.Extensions))
				if r.ExitedAt != nil {
					at := r.ExitedAt.AsTime()
					info.Exited = &at
				}
				for _, spec := range [][]byte{[]byte(r.Info["spec"]), b.Spec.GetValue()} {
					if info.Spec == nil && json.Valid(spec) {
						info.Spec = spec
					}
				}
				delete(info.Info, "spec")
				return table.PrintJSON(c.out, info)
			})
		},
	}
}

func (c *cli) sandboxesStop() *cobra.Command {
	timeout := 10 * time.Second
	cmd := &cobra.Command{
		Use: "stop ID...", Short: "End sandboxes; their records stay", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(ids, func(id string) error {
					b, err := known(ctx, cl, id)
					if err != nil {
						return err
					}
					return stopSandbox(ctx, cl, b, timeout)
				})
			})
		},
	}
	cmd.Flags().DurationVarP(&timeout, "time", "t", timeout, "`time` to give the processes in a shared pid namespace before they are killed")
	return cmd
}

func stopSandbox(ctx context.Context, cl *client.Client, b *types.Sandbox, timeout time.Duration) error {
	_, err := cl.SandboxController.Stop(ctx, &api.ControllerStopRequest{
		SandboxID: b.SandboxID, Sandboxer: b.Sandboxer, TimeoutSecs: uint32((timeout + time.Second - 1) / time.Second),
	})
	return err
}

func (c *cli) sandboxesWait() *cobra.Command {
	return &cobra.Command{
		Use: "wait ID", Short: "Wait for a sandbox's end, and exit with its status", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				b, err := known(ctx, cl, given[0])
				if err != nil {
					return err
				}
				r, err := cl.SandboxController.Wait(ctx, &api.ControllerWaitRequest{SandboxID: b.SandboxID, Sandboxer: b.Sandboxer})
				if err == nil && r.ExitStatus != 0 {
					return exitStatus(r.ExitStatus)
				}
				return err
			})
		},
	}
}

func (c *cli) sandboxesRm() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm ID...", Aliases: []string{"remove"}, Short: "End sandboxes and remove them", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(ids, func(id string) error { return removeSandbox(ctx, cl, id, force) })
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove it although it does not stop, or its shim does not answer")
	return cmd
}

func removeSandbox(ctx context.Context, cl *client.Client, id string, force bool) error {
	b, err := known(ctx, cl, id)
	if err != nil {
		return err
	}
	members, err := cl.Containers.List(ctx, &containersapi.ListContainersRequest{Filters: []string{"sandbox==" + strconv.Quote(id)}})
	if err != nil {
		return err
	}
	if len(members.Containers) > 0 && !force {
		var ids []string
		for _, m := range members.Containers {
			ids = append(ids, m.ID)
		}
		return fmt.Errorf("sandbox %s has containers in it: %s; remove them first, or see --force: %w", id, strings.Join(ids, ", "), errdefs.ErrFailedPrecondition)
	}
	if err := stopSandbox(ctx, cl, b, 0); err != nil && !force {
		return fmt.Errorf("%w; --force removes it all the same", err)
	}
	_, err = cl.SandboxController.Shutdown(ctx, &api.ControllerShutdownRequest{SandboxID: id, Sandboxer: b.Sandboxer})
	if err != nil && !errdefs.IsNotFound(err) && !force {
		return fmt.Errorf("%w; --force removes it all the same", err)
	}
	_, err = cl.Sandboxes.Delete(ctx, &api.StoreDeleteRequest{SandboxID: id})
	return err
}

func (c *cli) sandboxesPing() *cobra.Command {
	return &cobra.Command{
		Use: "ping ID...", Short: "Fail for sandboxes that are not ready", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(ids, func(id string) error {
					b, err := known(ctx, cl, id)
					if err != nil {
						return err
					}
					if state, _ := sandboxState(ctx, cl, b); state != "ready" {
						return fmt.Errorf("sandbox %s is %s: %w", id, state, errdefs.ErrFailedPrecondition)
					}
					return nil
				})
			})
		},
	}
}

func (c *cli) sandboxesMetrics() *cobra.Command {
	return &cobra.Command{
		Use: "metrics ID", Aliases: []string{"metric"}, Short: "Print what a sandbox uses, with all its members", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				b, err := known(ctx, cl, given[0])
				if err != nil {
					return err
				}
				r, err := cl.SandboxController.Metrics(ctx, &api.ControllerMetricsRequest{SandboxID: b.SandboxID, Sandboxer: b.Sandboxer})
				if err != nil {
					return err
				}
				m := r.Metrics
				return c.printMetrics(c.format(), m.GetID(), m.GetTimestamp().AsTime(), m.GetData())
			})
		},
	}
}
