package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

func (c *cli) contentCommand() *cobra.Command {
	ingests := c.contentIngests("ls")
	ingests.Aliases = []string{"list"}
	return group("content", "Manage the store of blobs", nil,
		c.contentLs(), c.contentGet(), c.contentFetch(), c.contentFetchObject(), c.contentFetchBlob(), c.contentPushObject(),
		c.contentLabel(), c.contentEdit(), c.contentIngest(ingests), c.contentActive(), c.contentRm(), c.contentPrune())
}

// ofBlob says what to do about an error about a blob.
func ofBlob(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w; `mctl content ls` lists what there is", err)
	}
	return err
}

type blobRow struct {
	Digest  string            `json:"digest"`
	Size    int64             `json:"size"` // bytes
	Created time.Time         `json:"created_at"`
	Labels  map[string]string `json:"labels,omitempty"`
}

var blobTable = table.Table[blobRow]{Columns: []table.Column[blobRow]{
	{Title: "DIGEST", Cell: func(r blobRow) string { return r.Digest }},
	{Title: "SIZE", Cell: func(r blobRow) string { return units.HumanSize(float64(r.Size)) }},
	{Title: "AGE", Cell: func(r blobRow) string { return units.HumanDuration(time.Since(r.Created)) }},
	{Title: "LABELS", Cell: func(r blobRow) string { return table.Labels(r.Labels, "-") }},
}}

func (c *cli) contentLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List blobs",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				s, err := cl.Content.List(ctx, &api.ListContentRequest{Filters: filters})
				if err != nil {
					return errgrpc.ToNative(err)
				}
				var rows []blobRow
				var digests []string
				for {
					m, err := s.Recv()
					if errors.Is(err, io.EOF) {
						return list(c, quiet, digests, blobTable, rows)
					}
					if err != nil {
						return errgrpc.ToNative(err)
					}
					for _, i := range m.Info {
						rows = append(rows, blobRow{i.Digest, i.Size, i.CreatedAt.AsTime(), i.Labels})
						digests = append(digests, i.Digest)
					}
				}
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

func (c *cli) contentGet() *cobra.Command {
	return &cobra.Command{
		Use: "get DIGEST", Short: "Write a blob to standard output", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			d, err := parseDigest(cmd, given[0])
			if err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				info, err := cl.Content.Info(ctx, &api.InfoRequest{Digest: d.String()})
				if err != nil {
					return ofBlob(err)
				}
				r, err := cl.Blobs().Open(ctx, ocispec.Descriptor{Digest: d, Size: info.Info.GetSize()})
				if err != nil {
					return ofBlob(err)
				}
				defer func() { _ = r.Close() }()
				if _, err = io.Copy(c.out, r); err != nil {
					return fmt.Errorf("cannot copy %s: %w", d, err)
				}
				return nil
			})
		},
	}
}

type ingestRow struct {
	Ref     string    `json:"ref"`
	Offset  int64     `json:"offset"` // bytes written
	Total   int64     `json:"total,omitempty"`
	Started time.Time `json:"started_at"`
	Updated time.Time `json:"updated_at"`
}

func (c *cli) contentActive() *cobra.Command {
	cmd := c.contentIngests("active")
	cmd.Flags().DurationVarP(&c.timeout, "timeout", "t", 0, "`time` that the command may take (10s, 5m; 0: any)")
	accepted(cmd, "the daemon knows where its content is, and ctr does not look at it", "root=")
	return cmd
}

func (c *cli) contentIngests(name string) *cobra.Command {
	return &cobra.Command{
		Use: name + " [FILTER...]", Short: "List writes under way",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Content.ListStatuses(ctx, &api.ListStatusesRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []ingestRow
				for _, s := range r.Statuses {
					rows = append(rows, ingestRow{s.Ref, s.Offset, s.Total, s.StartedAt.AsTime(), s.UpdatedAt.AsTime()})
				}
				return table.Table[ingestRow]{Columns: []table.Column[ingestRow]{
					{Title: "REF", Cell: func(r ingestRow) string { return r.Ref }},
					{Title: "SIZE", Cell: func(r ingestRow) string { return units.HumanSize(float64(r.Offset)) }},
					{Title: "AGE", Cell: func(r ingestRow) string { return units.HumanDuration(time.Since(r.Started)) }},
				}}.Print(c.out, c.format(), rows)
			})
		},
	}
}
