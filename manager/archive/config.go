package archive

import (
	"context"
	"fmt"

	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config gives an image's config for this machine's platform, and the chain ID of its layers: the name that their
// snapshot has once it is unpacked, empty for an image without layers. NotFound when a part of the image is not there.
func Config(ctx context.Context, c Content, target ocispec.Descriptor) (ocispec.Image, string, error) {
	return config(ctx, c, target, here())
}

// ConfigPlatform is Config for another platform, or the best that a machine of that platform can run.
func ConfigPlatform(ctx context.Context, c Content, target ocispec.Descriptor, platform ocispec.Platform) (ocispec.Image, string, error) {
	return config(ctx, c, target, wanted{platforms.Only(platform), platforms.FormatAll(platform)})
}

func config(ctx context.Context, c Content, target ocispec.Descriptor, want wanted) (ocispec.Image, string, error) {
	var config ocispec.Image
	n, err := newWalker(ctx, c).resolve(target, want)
	if err == nil {
		err = readJSON(ctx, c, n.config, &config)
	}
	if err != nil {
		return ocispec.Image{}, "", fmt.Errorf("cannot read the config of image %s: %w", target.Digest, err)
	}
	return config, identity.ChainID(config.RootFS.DiffIDs).String(), nil
}
