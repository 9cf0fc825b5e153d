// Package transfer moves images: from a registry into the stores (Pull), back (Push), and between the stores and archives
// (Import, Export). It must know neither the API nor how a registry is talked to.
package transfer

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive/local"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/snapshots"
)

// Remote is one repository at a registry, for one pull or push (registry.Repository). Its methods may be called from
// several goroutines.
type Remote interface {
	// Resolve finds what the reference stands for.
	Resolve(ctx context.Context) (ocispec.Descriptor, error)
	// Fetch opens content from a byte on. The caller closes it.
	Fetch(ctx context.Context, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error)
	// FetchRange is Fetch for length bytes; registry.ErrNoRanges at one that only sends all of a blob.
	FetchRange(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error)
	// Exists tells whether Push would have nothing to do.
	Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error)
	// Push sends content, unless it is there.
	Push(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt) error
	// Mount takes a blob from another repository of the registry; false when that cannot be.
	Mount(ctx context.Context, desc ocispec.Descriptor, from string) (bool, error)
}

// Config is what a Service works on, and how hard.
type Config struct {
	Content   *content.Store
	Images    *images.Store
	Snapshots *snapshots.Store // nil: nothing can be unpacked
	Leases    *leases.Store
	// Isolated is whether a namespace must fetch what another one fetches.
	Isolated bool
	Apply    diff.ApplyOptions // how layers are unpacked
	// Differs, if not nil, gives those by which layers of a platform are unpacked to a snapshotter, see local.Options.
	Differs func(platform ocispec.Platform, snapshotter string) []local.Differ
	// Verify, if not nil, is an error for what must not be pulled by this name. It is asked before content is fetched.
	Verify func(ctx context.Context, name string, desc ocispec.Descriptor) error

	Downloads int   // layers of one pull that are fetched at the same time; 3
	Ranges    int   // requests by which one of them is; 4
	Uploads   int   // layers of one push that are sent at the same time; 3
	PartSize  int64 // bytes of one of these requests; 8 MiB
	Log       *slog.Logger
}

// Service moves images. Its methods work in the namespace of their context, and in its lease; without one they have their
// own.
type Service struct {
	cfg     Config
	blobs   local.Content
	flights flights

	mu   sync.Mutex
	held map[string]*hold // leases of ours that are in use, by namespace and name
}

// New returns a service. A field of cfg that is 0 stands for the default named with it.
func New(cfg Config) *Service {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&cfg.Downloads, 3)
	def(&cfg.Ranges, 4)
	def(&cfg.Uploads, 3)
	if cfg.PartSize <= 0 {
		cfg.PartSize = 8 << 20
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{cfg: cfg, blobs: local.NewContent(cfg.Content), flights: flights{all: map[string]*flight{}}, held: map[string]*hold{}}
}

// snapshotter is where an image is to be unpacked.
func (s *Service) snapshotter(u Unpack) (local.Snapshotter, error) {
	o := local.Options{ApplyOptions: s.cfg.Apply}
	if s.cfg.Differs != nil {
		o.Differs = s.cfg.Differs(u.Platform, u.Snapshotter)
	}
	return local.NewSnapshotter(s.cfg.Snapshots, u.Snapshotter, s.blobs, o)
}

// source is where a name's content comes from: the registry's host and the repository's name there.
func source(name string) (host, repository string, err error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return "", "", fmt.Errorf("image name %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return reference.Domain(named), reference.Path(named), nil
}
