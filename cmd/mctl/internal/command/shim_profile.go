package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/managerd/managerd/cmd/mctl/internal/direct"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

func (k *keepers) pprof() *cobra.Command {
	r := &shim.ProfileRequest{}
	var file string
	var record time.Duration
	cmd := &cobra.Command{
		Use: "pprof ID PROFILE", Short: "Get a profile of a shim: heap, allocs, goroutine, threadcreate, block, mutex, or profile (of the CPU)", Args: args(2, 2),
		Long: `Writes a profile of the shim itself, for "go tool pprof", to standard output or to --file. With --debug it is text, and so is what
comes to a terminal. heap and allocs tell of what is allocated within --duration: a shim notes nothing before.`,
		Example: `  mctl shim pprof web heap --file heap.pb.gz
  mctl shim pprof web goroutine --debug 1
  mctl shim pprof web profile --duration 10s > cpu.pb.gz`,
		RunE: func(cmd *cobra.Command, given []string) error {
			if r.Debug < 0 || r.Debug > 2 {
				return misused(cmd, "--debug %d is none of 0, 1 and 2", r.Debug)
			}
			switch r.Name = given[1]; r.Name {
			case "profile", "heap", "allocs":
				r.DurationNano = int64(record)
			}
			return k.profile(cmd, given[0], file, r)
		},
	}
	cmd.Flags().DurationVar(&record, "duration", 5*time.Second, "of profile, heap and allocs: `time` to record")
	cmd.Flags().Int32Var(&r.Debug, "debug", 0, "0: for pprof, 1 or 2: text")
	cmd.Flags().StringVar(&file, "file", "", "`path` to write to")
	return cmd
}

func (k *keepers) trace() *cobra.Command {
	var file string
	var record time.Duration
	cmd := &cobra.Command{
		Use: "trace ID", Short: "Record what a shim does, for `go tool trace`", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.profile(cmd, given[0], file, &shim.ProfileRequest{Name: "trace", DurationNano: int64(record)})
		},
	}
	cmd.Flags().DurationVar(&record, "duration", time.Second, "`time` to record")
	cmd.Flags().StringVar(&file, "file", "", "`path` to write to")
	return cmd
}

// profile writes what the shim streams to a file, which is whole or not there, or to our output.
func (k *keepers) profile(cmd *cobra.Command, id, file string, r *shim.ProfileRequest) error {
	if out, ok := k.out.(*os.File); file == "" && ok && term.IsTerminal(int(out.Fd())) {
		if r.Name == "profile" || r.Name == "trace" {
			return misused(cmd, "a recording is no text for a terminal; name a --file, or redirect the output")
		}
		r.Debug = max(r.Debug, 1)
	}
	return k.ask(cmd, id, time.Duration(r.DurationNano)+answering, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
		stream, err := c.Shim().Profile(ctx, r)
		var whole bytes.Buffer // all of it is small
		for err == nil {
			var part *shim.ProfileResponse
			if part, err = stream.Recv(); err == nil {
				whole.Write(part.Data)
			}
		}
		if !errors.Is(err, io.EOF) {
			if err = shimapi.FromWire(err); errdefs.IsNotImplemented(err) {
				return fmt.Errorf("shim of container %s is not one of ours, or too old to be profiled: %w", s.ID, err)
			}
			return err
		}
		if file == "" {
			_, err = k.out.Write(whole.Bytes())
			return err
		}
		return os.WriteFile(file, whole.Bytes(), 0o644)
	})
}
