package archive

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/diff"
)

// labelRef on a snapshot that is being made names what it is to become.
const labelRef = "containerd.io/snapshot.ref"

// Unpack makes snapshots of the layers of an image, for this machine's platform, and gives the name of the topmost
// (empty for an image without layers): its chain ID, by which containers stand on it. What is there already is used, and
// any number of callers may unpack images that share layers at the same time. A context with a lease keeps the
// snapshots until the image's config refers to them. InvalidArgument for a layer that is malformed or not the one that
// the config speaks of.
func Unpack(ctx context.Context, c Content, s Snapshotter, target ocispec.Descriptor) (string, error) {
	return unpackFor(ctx, c, s, target, here())
}

// UnpackPlatform is Unpack for another platform, or what suits it best.
func UnpackPlatform(ctx context.Context, c Content, s Snapshotter, target ocispec.Descriptor, platform ocispec.Platform) (string, error) {
	return unpackFor(ctx, c, s, target, wanted{platforms.Only(platform), platforms.FormatAll(platform)})
}

func unpackFor(ctx context.Context, c Content, s Snapshotter, target ocispec.Descriptor, want wanted) (string, error) {
	chain, err := unpack(ctx, c, s, target, want)
	if err != nil {
		return "", fmt.Errorf("cannot unpack image %s: %w", target.Digest, err)
	}
	return chain, nil
}

func unpack(ctx context.Context, c Content, s Snapshotter, target ocispec.Descriptor, want wanted) (string, error) {
	n, err := newWalker(ctx, c).resolve(target, want)
	if err != nil {
		return "", err
	}
	if !isConfig(n.config.MediaType) {
		return "", fmt.Errorf("config of type %q is none of a container image: %w", n.config.MediaType, errdefs.ErrNotImplemented)
	}
	var config ocispec.Image
	if err := readJSON(ctx, c, n.config, &config); err != nil {
		return "", err
	}
	ids := config.RootFS.DiffIDs
	if len(ids) != len(n.layers) {
		return "", invalid("manifest %s has %d layers, its config has %d", n.desc.Digest, len(n.layers), len(ids))
	}
	for _, id := range ids {
		if err := id.Validate(); err != nil {
			return "", invalid("diff ID %q in config %s: %w", id, n.config.Digest, err)
		}
	}
	if len(ids) == 0 {
		return "", nil
	}
	chains := make([]string, len(ids))
	for i, id := range identity.ChainIDs(append([]digest.Digest(nil), ids...)) {
		chains[i] = id.String()
	}

	// Where one is there, so are those below it.
	next := len(chains)
	for ; next > 0; next-- {
		there, err := s.Exists(ctx, chains[next-1])
		if err != nil {
			return "", err
		}
		if there {
			break
		}
	}
	for ; next < len(chains); next++ {
		parent := ""
		if next > 0 {
			parent = chains[next-1]
		}
		if err := unpackLayer(ctx, c, s, n.layers[next], ids[next], parent, chains[next]); err != nil {
			return "", err
		}
	}
	top := chains[len(chains)-1]
	return top, c.SetLabels(ctx, n.config.Digest, map[string]string{labelRefSnapshot + s.Name(): top})
}

// attempts bounds how often a layer is begun anew because somebody else made, and removed, the same snapshot.
const attempts = 5

func unpackLayer(ctx context.Context, c Content, s Snapshotter, layer ocispec.Descriptor, id digest.Digest, parent, chain string) error {
	var err error
	for range attempts {
		key := fmt.Sprintf("extract-%d-%s %s", time.Now().Nanosecond(), unique()[:8], chain)
		if err = tryLayer(ctx, c, s, layer, id, key, parent, chain); !errdefs.IsAlreadyExists(err) {
			return err
		}
		there, serr := s.Exists(ctx, chain)
		if there || serr != nil {
			return serr // somebody else was faster
		}
	}
	return err
}

func tryLayer(ctx context.Context, c Content, s Snapshotter, layer ocispec.Descriptor, id digest.Digest, key, parent, chain string) (err error) {
	labels := map[string]string{labelRef: chain}
	mounts, err := s.Prepare(ctx, key, parent, labels)
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		// Also when the caller has gone: nobody else knows of it.
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if rerr := s.Remove(cleanup, key); rerr != nil && !errdefs.IsNotFound(rerr) {
			err = fmt.Errorf("%w (and %w)", err, rerr)
		}
	}()
	applied, err := s.Apply(ctx, layer, mounts)
	if err != nil {
		return err
	}
	if applied.Digest != id {
		return invalid("layer %s holds %s, the image's config says %s", layer.Digest, applied.Digest, id)
	}
	if err := s.Commit(ctx, chain, key, labels); err != nil {
		return err
	}
	if layer.Digest == id {
		return nil
	}
	// The snapshot is made: a label that cannot be written takes nothing back.
	if lerr := c.SetLabels(ctx, layer.Digest, map[string]string{diff.LabelUncompressed: id.String()}); lerr != nil && !errdefs.IsNotFound(lerr) {
		return fmt.Errorf("cannot label layer %s: %w", layer.Digest, lerr)
	}
	return nil
}
