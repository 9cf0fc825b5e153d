package command

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/shimapi/version"
)

type versions struct {
	Client programVersion `json:"client"`
	Server serverVersion  `json:"server"`
}

type programVersion struct {
	Version  string `json:"version"`
	Revision string `json:"revision"`
}

type serverVersion struct {
	programVersion
	UUID string `json:"uuid,omitempty"`
}

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the versions of mctl and of the daemon", Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				v := versions{Client: programVersion{version.Version, version.Revision}}
				if c.format() == table.Text { // also when the daemon does not answer
					_, _ = fmt.Fprintf(c.out, "Client:\n  Version:  %s\n  Revision: %s\n\n", v.Client.Version, v.Client.Revision)
				}
				server, err := cl.Version.Version(ctx, &emptypb.Empty{})
				if err != nil {
					return err
				}
				v.Server.programVersion = programVersion{server.Version, server.Revision}
				if s, err := cl.Introspection.Server(ctx, &emptypb.Empty{}); err == nil { // old daemons have none
					v.Server.UUID = s.UUID
				}
				if c.format() == table.JSON {
					return table.PrintJSON(c.out, v)
				}
				_, err = fmt.Fprintf(c.out, "Server:\n  Version:  %s\n  Revision: %s\n  UUID: %s\n", v.Server.Version, v.Server.Revision, v.Server.UUID)
				return err
			})
		},
	}
}
