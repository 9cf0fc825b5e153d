package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
)

// imageInfo is an image with all its parts.
type imageInfo struct {
	Name    string            `json:"name"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created_at"`
	Updated time.Time         `json:"updated_at"`
	Target  partInfo          `json:"target"`
}

type partInfo struct {
	Type        string            `json:"type"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"` // bytes
	Present     bool              `json:"present"`
	Platform    string            `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Content     json.RawMessage   `json:"content,omitempty"` // of an index, a manifest or a config, if it was asked for
	Children    []partInfo        `json:"children,omitempty"`
}

func partOf(p archive.Part) partInfo {
	out := partInfo{Type: p.MediaType, Digest: p.Digest.String(), Size: p.Size, Present: p.Present, Annotations: p.Annotations}
	if p.Platform != nil {
		out.Platform = platforms.Format(*p.Platform)
	}
	for _, child := range p.Children {
		out.Children = append(out.Children, partOf(child))
	}
	return out
}

// fill reads the content of what is JSON.
func (p *partInfo) fill(ctx context.Context, cl *client.Client) error {
	kind := archive.KindOf(p.Type)
	if p.Present && (kind == archive.Index || kind == archive.Manifest || kind == archive.Conf) {
		r, err := cl.Blobs().Open(ctx, ocispec.Descriptor{Digest: digest.Digest(p.Digest), Size: p.Size})
		if err != nil {
			return err
		}
		data, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil {
			return err
		}
		if json.Valid(data) {
			p.Content = data
		}
	}
	for i := range p.Children {
		if err := p.Children[i].fill(ctx, cl); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) imagesInspect() *cobra.Command {
	var content bool
	cmd := &cobra.Command{
		Use: "inspect NAME...", Aliases: []string{"i"}, Short: "Show what images consist of, for all platforms, and what of it is missing", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				infos := []imageInfo{}
				err := each(names, func(name string) error {
					found, err := cl.Image(ctx, name)
					if err != nil {
						return err
					}
					r, err := cl.Images.Get(ctx, &imagesapi.GetImageRequest{Name: found.Name})
					if err != nil {
						return ofImage(err)
					}
					i := r.Image
					tree, err := archive.Tree(ctx, cl.Blobs(), client.Descriptor(i.Target))
					if err != nil {
						return fmt.Errorf("%s: %w", i.Name, err)
					}
					info := imageInfo{i.Name, i.Labels, i.CreatedAt.AsTime(), i.UpdatedAt.AsTime(), partOf(tree)}
					if content {
						if err := info.Target.fill(ctx, cl); err != nil {
							return fmt.Errorf("%s: %w", i.Name, err)
						}
					}
					if c.format() == table.JSON {
						infos = append(infos, info)
						return nil
					}
					_, err = fmt.Fprint(c.out, drawImage(info))
					return err
				})
				if c.format() == table.JSON {
					if perr := table.PrintJSON(c.out, infos); err == nil {
						err = perr
					}
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&content, "content", false, "show the content of indexes, manifests and configs")
	return cmd
}

// drawImage draws an image as a tree.
func drawImage(i imageInfo) string {
	var out strings.Builder
	_, _ = fmt.Fprintf(&out, "%s\n", i.Name)
	for _, k := range slices.Sorted(maps.Keys(i.Labels)) {
		_, _ = fmt.Fprintf(&out, "│   Label: %s=%s\n", k, i.Labels[k])
	}
	_, _ = fmt.Fprintf(&out, "│   Created: %s\n│   Updated: %s\n", i.Created.Format(time.RFC3339), i.Updated.Format(time.RFC3339))
	drawPart(&out, i.Target, "", true)
	return out.String()
}

func drawPart(out *strings.Builder, p partInfo, before string, last bool) {
	knot, below := "├── ", before+"│   "
	if last {
		knot, below = "└── ", before+"    "
	}
	size := fmt.Sprintf("%d bytes", p.Size)
	if !p.Present {
		size += ", missing"
	}
	_, _ = fmt.Fprintf(out, "%s%s%s @%s (%s)\n", before, knot, p.Type, p.Digest, size)
	trunk := "    "
	if len(p.Children) > 0 {
		trunk = "│   "
	}
	if p.Platform != "" {
		_, _ = fmt.Fprintf(out, "%s%sPlatform: %s\n", below, trunk, p.Platform)
	}
	if p.Content != nil {
		var shown bytes.Buffer
		_ = json.Indent(&shown, p.Content, below+trunk, "   ") // it is valid
		_, _ = fmt.Fprintf(out, "%s%s%s\n", below, trunk, &shown)
	}
	for n, child := range p.Children {
		drawPart(out, child, below, n == len(p.Children)-1)
	}
}
