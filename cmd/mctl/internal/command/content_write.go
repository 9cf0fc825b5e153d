package command

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/diff"
)

// rootLabel has the collector keep what carries it. Its value is when it was set.
const rootLabel = "containerd.io/gc.root"

// rooted adds it to labels.
func rooted(labels map[string]string) map[string]string {
	labels[rootLabel] = time.Now().UTC().Format(time.RFC3339)
	return labels
}

// parseDigest reads ALGORITHM:HEX.
func parseDigest(cmd *cobra.Command, given string) (digest.Digest, error) {
	d, err := digest.Parse(given)
	if err != nil {
		return "", misused(cmd, "%q is no digest: %w", given, err)
	}
	return d, nil
}

// written is a blob that was written.
type written struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"` // bytes
}

func (c *cli) printWritten(w written) error {
	if c.format() == table.JSON {
		return table.PrintJSON(c.out, w)
	}
	_, err := fmt.Fprintln(c.out, w.Digest)
	return err
}

// ingest writes a blob that the collector keeps until its root label is cleared. A size that is not 0 and a digest that
// is not empty must be the blob's.
func ingest(ctx context.Context, cl *client.Client, ref string, r io.Reader, size int64, expected digest.Digest, labels map[string]string) (out written, err error) {
	err = cl.Leased(ctx, func(ctx context.Context) (err error) {
		w, err := cl.Blobs().Create(ctx, ref)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, w.Close()) }()
		b := bufio.NewWriterSize(w, 1<<20) // a message each
		n, err := io.Copy(b, r)
		if err == nil {
			err = b.Flush()
		}
		if err != nil {
			return fmt.Errorf("cannot write %q: %w", ref, err)
		}
		out = written{w.Digest().String(), n}
		return w.Commit(ctx, size, expected, rooted(labels))
	})
	return out, err
}

func (c *cli) contentIngest(below ...*cobra.Command) *cobra.Command {
	var size int64
	var expected string
	var given []string
	cmd := &cobra.Command{
		Use: "ingest [flags] REF", Short: "Write standard input to the store as a blob, and print its digest", Args: args(1, 1),
		Long: `Writes standard input to the store; REF names the write while it goes on. The blob is kept until it is removed, or its label
containerd.io/gc.root is cleared and nothing else refers to it.`,
		Example: "  mctl content ingest --expected-digest sha256:... layer <layer.tar.gz",
		RunE: func(cmd *cobra.Command, names []string) error {
			var d digest.Digest
			if expected != "" {
				var err error
				if d, err = parseDigest(cmd, expected); err != nil {
					return err
				}
			}
			labels, _, err := labelArgs(given)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				w, err := ingest(ctx, cl, names[0], ending(ctx, c.in), size, d, labels)
				if err != nil {
					return err
				}
				return c.printWritten(w)
			})
		},
	}
	cmd.Flags().Int64Var(&size, "expected-size", 0, "`bytes` that the blob must have (0: any)")
	cmd.Flags().StringVar(&expected, "expected-digest", "", "`digest` that the blob must have")
	cmd.Flags().StringArrayVar(&given, "label", nil, "`KEY=VALUE` for the blob; may be repeated")
	cmd.AddCommand(below...)
	return cmd
}

func (c *cli) contentLabel() *cobra.Command {
	return &cobra.Command{
		Use: "label DIGEST [KEY=VALUE...]", Short: "Set labels of a blob, or clear those given as KEY=, and print all", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			d, err := parseDigest(cmd, given[0])
			if err != nil {
				return err
			}
			labels, paths, err := labelArgs(given[1:])
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				if len(paths) == 0 {
					r, err := cl.Content.Info(ctx, &api.InfoRequest{Digest: d.String()})
					if err != nil {
						return ofBlob(err)
					}
					return c.printLabels(r.Info.Labels)
				}
				r, err := cl.Content.Update(ctx, &api.UpdateRequest{
					Info: &api.Info{Digest: d.String(), Labels: labels}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
				})
				if err != nil {
					return ofBlob(err)
				}
				return c.printLabels(r.Info.Labels)
			})
		},
	}
}

func (c *cli) contentRm() *cobra.Command {
	return &cobra.Command{
		Use: "rm DIGEST...", Aliases: []string{"delete", "del", "remove"}, Args: args(1, -1),
		Short: "Remove blobs, also those an image needs; one that is not there is not an error",
		RunE: func(cmd *cobra.Command, given []string) error {
			for _, g := range given {
				if _, err := parseDigest(cmd, g); err != nil {
					return err
				}
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(given, func(d string) error {
					_, err := cl.Content.Delete(ctx, &api.DeleteContentRequest{Digest: d})
					if errdefs.IsNotFound(err) { // as ctr does
						c.notice(err.Error())
						return nil
					}
					if err != nil || c.format() == table.JSON {
						return err
					}
					_, err = fmt.Fprintln(c.out, d)
					return err
				})
			})
		},
	}
}

// maxEdit is the largest blob that is edited, in bytes.
const maxEdit = 64 << 20

func (c *cli) contentEdit() *cobra.Command {
	var editor, validate string
	cmd := &cobra.Command{
		Use: "edit [flags] DIGEST", Short: "Edit a copy of a blob, and print the copy's digest", Args: args(1, 1),
		Long: `Has an editor change a copy of a blob, and writes the copy to the store with the labels of the original. The original stays;
what is not changed is not written. The copy is kept until it is removed, or its label containerd.io/gc.root is cleared.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			d, err := parseDigest(cmd, given[0])
			if err != nil {
				return err
			}
			if editor == "" {
				return misused(cmd, "there is no editor: name one with --editor or $EDITOR")
			}
			if validate != "" && validate != "json" {
				return misused(cmd, "cannot validate %q: json is what there is", validate)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Content.Info(ctx, &api.InfoRequest{Digest: d.String()})
				if err != nil {
					return ofBlob(err)
				}
				if r.Info.Size > maxEdit {
					return fmt.Errorf("%s has %d bytes, at most %d are edited: use `mctl content get` and `mctl content ingest`", d, r.Info.Size, maxEdit)
				}
				text, err := c.edited(ctx, cl, editor, ocispec.Descriptor{Digest: d, Size: r.Info.Size})
				if err != nil {
					return err
				}
				if validate == "json" && !json.Valid([]byte(text)) {
					return fmt.Errorf("the edited %s is no JSON, and was not written", d)
				}
				if d.Algorithm().FromString(text) == d {
					return c.printWritten(written{d.String(), r.Info.Size})
				}
				labels := map[string]string{}
				for k, v := range r.Info.Labels { // but what was true of the original only
					if k != diff.LabelUncompressed && !strings.HasPrefix(k, "containerd.io/distribution.source.") {
						labels[k] = v
					}
				}
				w, err := ingest(ctx, cl, fmt.Sprintf("edit-%d-%s", os.Getpid(), d), strings.NewReader(text), int64(len(text)), "", labels)
				if err != nil {
					return err
				}
				return c.printWritten(w)
			})
		},
	}
	cmd.Flags().StringVar(&editor, "editor", env("", "EDITOR"), "`command` that edits the file it is given (default: $EDITOR)")
	cmd.Flags().StringVar(&validate, "validate", "", "`format` that the result must have: json")
	return cmd
}

// edited is what the editor makes of a blob. The editor draws on standard error, for standard output is the result's.
func (c *cli) edited(ctx context.Context, cl *client.Client, editor string, desc ocispec.Descriptor) (_ string, err error) {
	r, err := cl.Blobs().Open(ctx, desc)
	if err != nil {
		return "", ofBlob(err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	f, err := os.CreateTemp("", "mctl-edit-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("cannot copy %s: %w", desc.Digest, err)
	}
	e := exec.CommandContext(ctx, "sh", "-c", editor+` "$1"`, "sh", f.Name())
	e.Stdin, e.Stdout, e.Stderr = c.in, c.err, c.err
	if err := e.Run(); err != nil {
		return "", fmt.Errorf("%s was not edited: editor %q: %w", desc.Digest, editor, err)
	}
	text, err := os.ReadFile(f.Name())
	return string(text), err
}
