package api

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/images"
)

// Images serves containerd.services.images.v1.Images.
type Images struct {
	api.UnimplementedImagesServer
	store   *images.Store
	events  Publisher
	collect Collect
}

// Collect removes what nobody needs, and returns when that is done; nil when there is no collector.
type Collect func(context.Context) error

// now collects when a client asks for that with a deletion.
func (c Collect) now(ctx context.Context, sync bool) error {
	if !sync || c == nil {
		return nil
	}
	return c(ctx)
}

// NewImages serves store. collect is called by deletions that ask for it.
func NewImages(store *images.Store, events Publisher, collect Collect) *Images {
	return &Images{store: store, events: events, collect: collect}
}

// Register adds the service to a server.
func (a *Images) Register(s *grpc.Server) { api.RegisterImagesServer(s, a) }

func descriptorToWire(d ocispec.Descriptor) *types.Descriptor {
	return &types.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size, Annotations: d.Annotations}
}

func descriptorFromWire(d *types.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.GetMediaType(), Digest: digest.Digest(d.GetDigest()), Size: d.GetSize(), Annotations: d.GetAnnotations()}
}

func imageToWire(i images.Image) *api.Image {
	return &api.Image{
		Name: i.Name, Labels: i.Labels, Target: descriptorToWire(i.Target),
		CreatedAt: timestamppb.New(i.CreatedAt), UpdatedAt: timestamppb.New(i.UpdatedAt),
	}
}

func imageFromWire(i *api.Image) images.Image {
	return images.Image{Name: i.GetName(), Labels: i.GetLabels(), Target: descriptorFromWire(i.GetTarget())}
}

// Get finds an image.
func (a *Images) Get(ctx context.Context, r *api.GetImageRequest) (*api.GetImageResponse, error) {
	i, err := a.store.Get(ctx, r.Name)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.GetImageResponse{Image: imageToWire(i)}, nil
}

// List gives the images that match.
func (a *Images) List(ctx context.Context, r *api.ListImagesRequest) (*api.ListImagesResponse, error) {
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return nil, toGRPC(err)
	}
	all, err := a.store.List(ctx, f)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.ListImagesResponse{}
	for _, i := range all {
		resp.Images = append(resp.Images, imageToWire(i))
	}
	return resp, nil
}

// Create adds an image.
func (a *Images) Create(ctx context.Context, r *api.CreateImageRequest) (*api.CreateImageResponse, error) {
	i, err := a.store.Create(ctx, imageFromWire(r.Image))
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := a.events.Publish(ctx, "/images/create", &events.ImageCreate{Name: i.Name, Labels: i.Labels}); err != nil {
		return nil, toGRPC(err)
	}
	return &api.CreateImageResponse{Image: imageToWire(i)}, nil
}

// Update changes an image.
func (a *Images) Update(ctx context.Context, r *api.UpdateImageRequest) (*api.UpdateImageResponse, error) {
	if r.Image.GetName() == "" {
		return nil, toGRPC(fmt.Errorf("no image given: %w", errdefs.ErrInvalidArgument))
	}
	i, err := a.store.Update(ctx, imageFromWire(r.Image), r.UpdateMask.GetPaths()...)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := a.events.Publish(ctx, "/images/update", &events.ImageUpdate{Name: i.Name, Labels: i.Labels}); err != nil {
		return nil, toGRPC(err)
	}
	return &api.UpdateImageResponse{Image: imageToWire(i)}, nil
}

// Delete removes an image, and with Sync what only that needed.
func (a *Images) Delete(ctx context.Context, r *api.DeleteImageRequest) (*emptypb.Empty, error) {
	if err := a.store.Delete(ctx, r.Name, digest.Digest(r.GetTarget().GetDigest())); err != nil {
		return nil, toGRPC(err)
	}
	if err := a.events.Publish(ctx, "/images/delete", &events.ImageDelete{Name: r.Name}); err != nil {
		return nil, toGRPC(err)
	}
	return done, toGRPC(a.collect.now(ctx, r.Sync))
}
