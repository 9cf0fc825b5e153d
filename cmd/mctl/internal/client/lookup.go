package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/metadata"

	"github.com/managerd/managerd/manager/archive"
)

const (
	defaultSnapshotter = "overlayfs"
	// snapshotterLabel on a namespace names the snapshotter for those who name none.
	snapshotterLabel = "containerd.io/defaults/snapshotter"
)

// DefaultSnapshotter is named if that is not empty, else what the namespace's label says, else overlayfs.
func (c *Client) DefaultSnapshotter(ctx context.Context, namespace, named string) (string, error) {
	if named == "" {
		named = os.Getenv("CONTAINERD_SNAPSHOTTER")
	}
	if named != "" {
		return named, nil
	}
	r, err := c.Namespaces.Get(ctx, &namespacesapi.GetNamespaceRequest{Name: namespace})
	if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	if name := r.GetNamespace().GetLabels()[snapshotterLabel]; name != "" {
		return name, nil
	}
	return defaultSnapshotter, nil
}

// Descriptor is the wire's one as package archive uses it.
func Descriptor(d *types.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.GetMediaType(), Digest: digest.Digest(d.GetDigest()), Size: d.GetSize(), Annotations: d.GetAnnotations()}
}

// Image finds an image by its name, and if there is none of that name by what docker would take it for: busybox is
// docker.io/library/busybox:latest.
func (c *Client) Image(ctx context.Context, name string) (archive.Image, error) {
	r, err := c.Images.Get(ctx, &imagesapi.GetImageRequest{Name: name})
	if errdefs.IsNotFound(err) {
		if named, perr := reference.ParseNormalizedNamed(name); perr == nil {
			if full := reference.TagNameOnly(named).String(); full != name {
				if r, ferr := c.Images.Get(ctx, &imagesapi.GetImageRequest{Name: full}); ferr == nil {
					return archive.Image{Name: r.Image.Name, Target: Descriptor(r.Image.Target)}, nil
				}
			}
		}
	}
	if errdefs.IsNotFound(err) {
		return archive.Image{}, fmt.Errorf("%w; `mctl images ls` lists what there is, `mctl images import FILE` adds to it", err)
	}
	return archive.Image{Name: r.GetImage().GetName(), Target: Descriptor(r.GetImage().GetTarget())}, err
}

// Leased calls f with a context whose work the collector leaves alone until f returns.
func (c *Client) Leased(ctx context.Context, f func(context.Context) error) (err error) {
	// A lease that nobody ends, because we are killed, ends itself.
	labels := map[string]string{"containerd.io/gc.expire": time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339)}
	id := fmt.Sprintf("mctl-%d-%d", os.Getpid(), time.Now().UnixNano())
	if _, err := c.Leases.Create(ctx, &leasesapi.CreateRequest{ID: id, Labels: labels}); err != nil {
		return err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if _, lerr := c.Leases.Delete(end, &leasesapi.DeleteRequest{ID: id}); !errdefs.IsNotFound(lerr) {
			err = errors.Join(err, lerr)
		}
	}()
	return f(metadata.AppendToOutgoingContext(ctx, "containerd-lease", id))
}
