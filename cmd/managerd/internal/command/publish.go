package command

import (
	"context"
	"fmt"
	"io"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/namespaces"
)

// publishing is how long a daemon that is just restarting may keep a publisher waiting.
const publishing = 10 * time.Second

// publishCommand hands an event to a running daemon: how shims that know no better way tell what happened.
func (f *flags) publishCommand() *cobra.Command {
	var topic, namespace string
	c := &cobra.Command{
		Use: "publish", Short: "Publish an event, a serialised google.protobuf.Any, from standard input", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := f.load()
			if err != nil {
				return err
			}
			data, err := io.ReadAll(cmd.InOrStdin())
			if err != nil {
				return fmt.Errorf("cannot read the event: %w", err)
			}
			body := &anypb.Any{}
			if err := proto.Unmarshal(data, body); err != nil {
				return fmt.Errorf("the event on standard input is no google.protobuf.Any: %w", err)
			}
			conn, err := grpc.NewClient("unix://"+cfg.GRPC.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				return fmt.Errorf("cannot connect to %s: %w", cfg.GRPC.Address, err)
			}
			defer func() { _ = conn.Close() }()
			ctx, cancel := context.WithTimeout(namespaces.With(cmd.Context(), namespace), publishing)
			defer cancel()
			_, err = eventsapi.NewEventsClient(conn).Publish(ctx, &eventsapi.PublishRequest{Topic: topic, Event: body}, grpc.WaitForReady(true))
			if err != nil {
				return fmt.Errorf("cannot publish %s in namespace %s: %w", topic, namespace, err)
			}
			return nil
		},
	}
	c.Flags().StringVar(&topic, "topic", "", "`topic` of the event, such as /tasks/exit")
	c.Flags().StringVar(&namespace, "namespace", "", "`namespace` of the event")
	_ = c.MarkFlagRequired("topic")
	_ = c.MarkFlagRequired("namespace")
	return c
}
