package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

// collect has what nobody needs removed, and returns when that is done: a lease that keeps nothing is all it takes to ask.
func collect(ctx context.Context, cl *client.Client) error {
	r, err := cl.Leases.Create(ctx, &leasesapi.CreateRequest{})
	if err != nil {
		return err
	}
	_, err = cl.Leases.Delete(ctx, &leasesapi.DeleteRequest{ID: r.Lease.ID, Sync: true})
	return err
}

type prunedRow struct {
	Name string `json:"name"`
}

func (c *cli) printPruned(rows []prunedRow) error {
	if c.format() == table.JSON {
		return table.Table[prunedRow]{}.Print(c.out, table.JSON, rows)
	}
	for _, r := range rows {
		if _, err := fmt.Fprintln(c.out, r.Name); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) imagesPrune() *cobra.Command {
	var all, dry bool
	cmd := &cobra.Command{
		Use: "prune --all", Short: "Remove the images that no container was made of, and what only they held", Args: args(0, 0),
		Example: "  mctl images prune --all --dry",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !all {
				return misused(cmd, "say --all: an image that no container was made of may be wanted all the same")
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Images.List(ctx, &imagesapi.ListImagesRequest{})
				if err != nil {
					return err
				}
				used, err := cl.Containers.List(ctx, &containersapi.ListContainersRequest{})
				if err != nil {
					return err
				}
				var gone []prunedRow
				for _, i := range r.Images {
					if slices.ContainsFunc(used.Containers, func(c *containersapi.Container) bool { return c.Image == i.Name }) {
						continue
					}
					if !dry {
						// Only what was looked at: the name may stand for another image by now.
						_, err := cl.Images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: i.Name, Target: i.Target})
						if errdefs.IsNotFound(err) {
							continue
						}
						if err != nil {
							return err
						}
					}
					gone = append(gone, prunedRow{i.Name})
				}
				if !dry {
					err = collect(ctx, cl)
				}
				return errors.Join(c.printPruned(gone), err)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "yes, all of them")
	cmd.Flags().BoolVar(&dry, "dry", false, "only say what would be removed")
	return cmd
}

// layerRef is how the label of a manifest begins that has the collector keep a layer.
const layerRef = "containerd.io/gc.ref.content.l."

func (c *cli) contentPrune() *cobra.Command {
	var async, dry bool
	references := &cobra.Command{
		Use: "references", Short: "Let go of layers' blobs: what was unpacked runs without them", Args: args(0, 0),
		Long: `Takes from every manifest the labels that keep its layers' blobs, and has the collector remove those. Unpacked images run as
before; to push, export or unpack them again their layers are to be pulled anew.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				held, err := layerRefs(ctx, cl)
				if err != nil {
					return err
				}
				var gone []prunedRow
				for _, i := range held {
					var paths []string
					for l, d := range i.Labels {
						if strings.HasPrefix(l, layerRef) {
							paths = append(paths, "labels."+l)
							gone = append(gone, prunedRow{d})
						}
					}
					if dry {
						continue
					}
					_, err := cl.Content.Update(ctx, &contentapi.UpdateRequest{Info: &contentapi.Info{Digest: i.Digest}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}})
					if err != nil && !errdefs.IsNotFound(err) {
						return err
					}
				}
				slices.SortFunc(gone, func(a, b prunedRow) int { return strings.Compare(a.Name, b.Name) })
				gone = slices.Compact(gone)
				if !dry && !async {
					err = collect(ctx, cl)
				}
				return errors.Join(c.printPruned(gone), err)
			})
		},
	}
	references.Flags().BoolVar(&async, "async", false, "do not wait until the blobs are removed")
	references.Flags().BoolVar(&dry, "dry", false, "only say what would be let go of")
	return group("prune", "Let go of content", nil, references)
}

// layerRefs finds the manifests that keep layers.
func layerRefs(ctx context.Context, cl *client.Client) (out []*contentapi.Info, err error) {
	s, err := cl.Content.List(ctx, &contentapi.ListContentRequest{})
	for err == nil {
		var m *contentapi.ListContentResponse
		if m, err = s.Recv(); err != nil {
			break
		}
		for _, i := range m.Info {
			for l := range i.Labels {
				if strings.HasPrefix(l, layerRef) {
					out = append(out, i)
					break
				}
			}
		}
	}
	if !errors.Is(err, io.EOF) {
		return nil, errgrpc.ToNative(err)
	}
	return out, nil
}
