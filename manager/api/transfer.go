package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"

	api "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/api/types"
	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/registry"
	"github.com/managerd/managerd/manager/streaming"
	"github.com/managerd/managerd/manager/transfer"
	"github.com/managerd/managerd/manager/transfer/wish"
)

// Transfer serves containerd.services.transfer.v1.Transfer.
type Transfer struct {
	api.UnimplementedTransferServer
	service     *transfer.Service
	registry    *registry.Registry
	streams     *streaming.Manager
	snapshotter func(context.Context, ocispec.Platform) (string, error)
}

// NewTransfer has service move images, from and to what registry finds, over what clients opened in streams. snapshotter
// names that of a namespace, for images of a platform whose clients name none.
func NewTransfer(service *transfer.Service, r *registry.Registry, streams *streaming.Manager, snapshotter func(context.Context, ocispec.Platform) (string, error)) *Transfer {
	return &Transfer{service: service, registry: r, streams: streams, snapshotter: snapshotter}
}

// Register adds the service to a server.
func (a *Transfer) Register(s *grpc.Server) { api.RegisterTransferServer(s, a) }

// Transfer moves from what the request's source is to what its destination is, and returns when that is done. What it has
// to say is sent before it returns.
func (a *Transfer) Transfer(ctx context.Context, r *api.TransferRequest) (*emptypb.Empty, error) {
	from, err := unpackAny("source", r.Source)
	if err != nil {
		return nil, toGRPC(err)
	}
	to, err := unpackAny("destination", r.Destination)
	if err != nil {
		return nil, toGRPC(err)
	}
	progress, end, err := a.progress(ctx, r.GetOptions().GetProgressStream())
	if err != nil {
		return nil, toGRPC(err)
	}
	defer end()
	return done, toGRPC(a.transfer(ctx, from, to, progress))
}

func unpackAny(what string, a *anypb.Any) (any, error) {
	if a == nil {
		return nil, fmt.Errorf("the %s of the transfer is missing: %w", what, errdefs.ErrInvalidArgument)
	}
	v, err := typeurl.UnmarshalAny(a)
	if errdefs.IsNotFound(err) || errors.Is(err, typeurl.ErrNotFound) {
		return nil, fmt.Errorf("a transfer has no %s of type %q: %w", what, a.GetTypeUrl(), errdefs.ErrNotImplemented)
	}
	if err != nil {
		return nil, fmt.Errorf("the %s of the transfer, a %q: %w: %w", what, a.GetTypeUrl(), err, errdefs.ErrInvalidArgument)
	}
	return v, nil
}

func (a *Transfer) transfer(ctx context.Context, from, to any, progress func(transfer.Progress)) error {
	switch from := from.(type) {
	case *wire.OCIRegistry:
		if to, ok := to.(*wire.ImageStore); ok {
			return a.pull(ctx, from, to, progress)
		}
	case *wire.ImageImportStream:
		switch to := to.(type) {
		case *wire.ImageStore:
			return a.importing(ctx, from, to, progress)
		case *wire.ImageExportStream:
			return a.echo(ctx, from, to)
		}
	case *wire.ImageStore:
		switch to := to.(type) {
		case *wire.OCIRegistry:
			return a.push(ctx, from, to, progress)
		case *wire.ImageExportStream:
			return a.export(ctx, from, to, progress)
		case *wire.ImageStore:
			return a.tag(ctx, from, to)
		}
	}
	return fmt.Errorf("nothing is transferred from %s to %s here: %w", nameOf(from), nameOf(to), errdefs.ErrNotImplemented)
}

// nameOf is what a client calls the type of a source or destination.
func nameOf(v any) string {
	if m, ok := v.(proto.Message); ok {
		return string(m.ProtoReflect().Descriptor().FullName())
	}
	return fmt.Sprintf("%T", v)
}

// echo sends a client back what it sends.
func (a *Transfer) echo(ctx context.Context, from *wire.ImageImportStream, to *wire.ImageExportStream) error {
	in, err := a.streams.Get(ctx, from.Stream)
	if err != nil {
		return err
	}
	out, err := a.streams.Get(ctx, to.Stream)
	if err != nil {
		return err
	}
	r, w := streaming.Reader(in), streaming.Writer(ctx, out)
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close(), r.Close())
}

func (a *Transfer) pull(ctx context.Context, from *wire.OCIRegistry, to *wire.ImageStore, progress func(transfer.Progress)) error {
	open, err := a.open(ctx, from)
	if err != nil {
		return err
	}
	image, err := a.image(ctx, to)
	if err != nil {
		return err
	}
	remote, err := open(from.Reference)
	if err != nil {
		return err
	}
	_, err = a.service.Pull(ctx, from.Reference, remote, image, progress)
	return err
}

func (a *Transfer) push(ctx context.Context, from *wire.ImageStore, to *wire.OCIRegistry, progress func(transfer.Progress)) error {
	open, err := a.open(ctx, to)
	if err != nil {
		return err
	}
	image, err := a.image(ctx, from)
	if err != nil {
		return err
	}
	return a.service.Push(ctx, to.Reference, open, image, progress)
}

func (a *Transfer) tag(ctx context.Context, from, to *wire.ImageStore) error {
	image, err := a.image(ctx, from)
	if err != nil {
		return err
	}
	tag, err := a.image(ctx, to)
	if err != nil {
		return err
	}
	return a.service.Tag(ctx, image, tag)
}

func (a *Transfer) importing(ctx context.Context, from *wire.ImageImportStream, to *wire.ImageStore, progress func(transfer.Progress)) error {
	image, err := a.image(ctx, to)
	if err != nil {
		return err
	}
	s, err := a.streams.Get(ctx, from.Stream)
	if err != nil {
		return err
	}
	r := streaming.Reader(s)
	_, err = a.service.Import(ctx, r, image, from.ForceCompress, progress)
	return errors.Join(err, r.Close())
}

func (a *Transfer) export(ctx context.Context, from *wire.ImageStore, to *wire.ImageExportStream, progress func(transfer.Progress)) error {
	image, err := a.image(ctx, from)
	if err != nil {
		return err
	}
	s, err := a.streams.Get(ctx, to.Stream)
	if err != nil {
		return err
	}
	w := streaming.Writer(ctx, s)
	err = a.service.Export(ctx, w, image, archive.ExportOptions{
		AllPlatforms: to.AllPlatforms, Platforms: types.OCIPlatformFromProto(to.Platforms), NoDocker: to.SkipCompatibilityManifest, NoForeign: to.SkipNonDistributable,
	}, progress)
	return errors.Join(err, w.Close())
}

// progress gives what tells a client's stream of a transfer, nil when it has none, and what ends that.
func (a *Transfer) progress(ctx context.Context, stream string) (func(transfer.Progress), func(), error) {
	if stream == "" {
		return nil, func() {}, nil
	}
	s, err := a.streams.Get(ctx, stream)
	if err != nil {
		return nil, nil, err
	}
	tell := func(p transfer.Progress) {
		w := &wire.Progress{Event: p.Event, Name: p.Name, Parents: p.Parents, Progress: p.Progress, Total: p.Total}
		if p.Desc != nil {
			w.Desc = descriptorToWire(*p.Desc)
		}
		_ = streaming.Message(s, w) // a client that does not listen any more misses it
	}
	return tell, func() { _ = s.Close() }, nil
}

func (a *Transfer) image(ctx context.Context, i *wire.ImageStore) (transfer.Image, error) {
	image := transfer.Image{
		Name: i.Name, Labels: i.Labels, Platforms: types.OCIPlatformFromProto(i.Platforms), AllMetadata: i.AllMetadata, ManifestLimit: int(i.ManifestLimit),
	}
	var err error
	if image.Wish, err = wish.From(ctx); err != nil {
		return image, err
	}
	for _, r := range i.ExtraReferences {
		image.References = append(image.References, transfer.Reference{
			Name: r.Name, Prefix: r.IsPrefix, Overwrite: r.AllowOverwrite, Digest: r.AddDigest, SkipNamed: r.SkipNamedDigest,
		})
	}
	for _, u := range i.Unpacks {
		unpack := transfer.Unpack{Platform: platforms.DefaultSpec(), Snapshotter: u.Snapshotter}
		if u.Platform != nil {
			unpack.Platform = platforms.Normalize(ocispec.Platform{
				OS: u.Platform.OS, Architecture: u.Platform.Architecture, Variant: u.Platform.Variant,
				OSVersion: u.Platform.OSVersion, OSFeatures: u.Platform.OSFeatures,
			})
		}
		if unpack.Snapshotter == "" {
			name, err := a.snapshotter(ctx, unpack.Platform)
			if err != nil {
				return image, err
			}
			unpack.Snapshotter = name
		}
		image.Unpacks = append(image.Unpacks, unpack)
	}
	return image, nil
}

// open gives what opens repositories as a request wants them opened.
func (a *Transfer) open(ctx context.Context, r *wire.OCIRegistry) (_ func(ref string) (transfer.Remote, error), err error) {
	if r.Reference == "" {
		return nil, fmt.Errorf("the transfer has no reference: %w", errdefs.ErrInvalidArgument)
	}
	o := registry.Options{HostDir: r.Resolver.GetHostDir(), Headers: http.Header{}}
	for k, v := range r.Resolver.GetHeaders() {
		o.Headers.Set(k, v)
	}
	switch scheme := r.Resolver.GetDefaultScheme(); scheme {
	case "", "https":
	case "http":
		o.PlainHTTP = true
	default:
		return nil, fmt.Errorf("default scheme %q is neither http nor https: %w", scheme, errdefs.ErrInvalidArgument)
	}
	if o.Debug, err = a.debug(ctx, r.Resolver); err != nil {
		return nil, err
	}
	if id := r.Resolver.GetAuthStream(); id != "" {
		s, err := a.streams.Get(ctx, id)
		if err != nil {
			return nil, err
		}
		o.Credentials = (&asking{stream: s, reference: r.Reference}).credentials
	}
	return func(ref string) (transfer.Remote, error) {
		p, err := a.registry.Repository(ref, o)
		if err != nil {
			return nil, err
		}
		return p, nil
	}, nil
}

// debug tells a client's stream what is asked of registries, as far as it wants to know; without a stream, the log.
func (a *Transfer) debug(ctx context.Context, r *wire.RegistryResolver) (*registry.Debug, error) {
	d := &registry.Debug{}
	switch kind := r.GetHttpDebug(); kind {
	case wire.HTTPDebug_DISABLED:
		return nil, nil
	case wire.HTTPDebug_DEBUG, wire.HTTPDebug_TRACE, wire.HTTPDebug_BOTH:
		d.Messages, d.Connections = kind != wire.HTTPDebug_TRACE, kind != wire.HTTPDebug_DEBUG
	default:
		return nil, fmt.Errorf("HTTP debug %d is not known: %w", kind, errdefs.ErrInvalidArgument)
	}
	if r.LogsStream == "" {
		d.Say = func(text string) { slog.InfoContext(ctx, text) }
		return d, nil
	}
	s, err := a.streams.Get(ctx, r.LogsStream)
	if err != nil {
		return nil, err
	}
	w := streaming.Writer(ctx, s)
	context.AfterFunc(ctx, func() { _ = w.Close() })
	var mu sync.Mutex
	d.Say = func(text string) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = io.WriteString(w, text) // a client that does not listen any more misses it
	}
	return d, nil
}

// asking asks a client who it is, for one registry at a time.
type asking struct {
	reference string

	mu     sync.Mutex
	stream streaming.Stream
}

func (a *asking) credentials(_ context.Context, host string) (c registry.Credential, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := streaming.Message(a.stream, &wire.AuthRequest{Host: host, Reference: a.reference}); err != nil {
		return c, fmt.Errorf("cannot ask the client for credentials of %s: %w", host, err)
	}
	var r wire.AuthResponse
	if err := streaming.Receive(a.stream, &r); err != nil {
		return c, fmt.Errorf("the client gives no credentials of %s: %w", host, err)
	}
	switch r.AuthType {
	case wire.AuthType_NONE:
	case wire.AuthType_CREDENTIALS:
		c.Username, c.Password = r.Username, r.Secret
	case wire.AuthType_REFRESH:
		c.RefreshToken = r.Secret
	case wire.AuthType_HEADER:
		c.Header = r.Secret
	default:
		return c, fmt.Errorf("the client's credentials of %s are of kind %d, which is not known: %w", host, r.AuthType, errdefs.ErrInvalidArgument)
	}
	return c, nil
}
