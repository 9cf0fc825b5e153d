package archive

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/managerd/managerd/manager/diff"
)

// ConvertOptions says what an image is made into.
type ConvertOptions struct {
	// OCI gives manifests, configs and layers OCI's media types instead of Docker's.
	OCI bool
	// Layers, if not nil, is how layers are packed.
	Layers *diff.Compression
	// AllPlatforms takes every image of an index, and fails when one is not there; otherwise those for this machine's.
	AllPlatforms bool
	// Platforms takes those for any of these instead.
	Platforms []ocispec.Platform
}

// Convert makes another image of target and gives its descriptor: target itself when there is nothing to do. The layers'
// content stays the same, and so does the config. Layers are packed at the same time, each verified by its digest and by
// the diff ID that the config has for it; what is not to be distributed, and what is no layer, stays as it is. The
// context must carry a lease, which keeps the new blobs until an image refers to them. InvalidArgument for an image that
// is malformed, FailedPrecondition for a layer that is not what its digest says, NotFound when a part of the image, or an
// image for the platforms, is not there.
func Convert(ctx context.Context, c Content, target ocispec.Descriptor, o ConvertOptions) (ocispec.Descriptor, error) {
	v := &converter{
		walker: newWalker(ctx, c), o: o, want: wanted{platforms.OnlyStrict(platforms.DefaultSpec()), platforms.DefaultString()},
		done: map[string]ocispec.Descriptor{}, layers: map[digest.Digest]*packing{},
	}
	if len(o.Platforms) > 0 {
		v.want = wanted{platforms.Any(o.Platforms...), formatAll(o.Platforms)}
	}
	if o.AllPlatforms {
		v.want = wanted{platforms.All, "any platform"}
	}
	desc, err := v.convert(ctx, target, 0)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("cannot convert image %s: %w", target.Digest, err)
	}
	return desc, nil
}

type converter struct {
	*walker
	o    ConvertOptions
	want wanted
	done map[string]ocispec.Descriptor // what indexes and manifests became, by key

	mu     sync.Mutex
	layers map[digest.Digest]*packing // those of several images are packed once; guarded by mu
}

// packing is a layer that is packed anew.
type packing struct {
	once sync.Once
	desc ocispec.Descriptor // digest and size
	id   digest.Digest      // of what is inside
	err  error
}

func (v *converter) convert(ctx context.Context, desc ocispec.Descriptor, depth int) (ocispec.Descriptor, error) {
	if err := deep(depth); err != nil {
		return desc, err
	}
	if d, ok := v.done[key(desc)]; ok {
		desc.MediaType, desc.Digest, desc.Size, desc.Data = d.MediaType, d.Digest, d.Size, d.Data
		return desc, nil
	}
	if _, err := v.node(desc); err != nil {
		return desc, err
	}
	was := key(desc)
	var err error
	if isIndex(desc.MediaType) {
		desc, err = v.index(ctx, desc, depth)
	} else {
		desc, err = v.manifest(ctx, desc)
	}
	if err == nil {
		v.done[was] = desc
	}
	return desc, err
}

// referenceDigest on an attestation in an index is the digest of the manifest it is about.
const referenceDigest = "vnd.docker.reference.digest"

func (v *converter) index(ctx context.Context, desc ocispec.Descriptor, depth int) (ocispec.Descriptor, error) {
	var index ocispec.Index
	if err := readJSON(ctx, v.c, desc, &index); err != nil {
		return desc, err
	}
	was := index.Manifests
	index.Manifests = []ocispec.Descriptor{}
	became := map[string]string{}
	changed := false
	var has []string
	for _, m := range was {
		is := isIndex(m.MediaType) || isManifest(m.MediaType)
		take, platform, err := v.takes(m, is)
		if err != nil {
			return desc, err
		}
		if !take {
			if platform != nil && !attests(m) {
				has = append(has, platforms.FormatAll(*platform))
			}
			changed = true
			continue
		}
		n := m
		if is {
			if n, err = v.convert(ctx, m, depth+1); err != nil {
				return desc, err
			}
		}
		changed = changed || n.Digest != m.Digest || n.MediaType != m.MediaType
		became[m.Digest.String()] = n.Digest.String()
		index.Manifests = append(index.Manifests, n)
	}
	if len(index.Manifests) == 0 {
		return desc, lacks(desc.Digest, v.want.name, has)
	}
	for i, m := range index.Manifests {
		if now, ok := became[m.Annotations[referenceDigest]]; ok {
			m.Annotations = maps.Clone(m.Annotations)
			m.Annotations[referenceDigest] = now
			index.Manifests[i] = m
		}
	}
	if v.o.OCI && desc.MediaType != ocispec.MediaTypeImageIndex {
		desc.MediaType, changed = ocispec.MediaTypeImageIndex, true
	}
	if !changed {
		return desc, nil
	}
	index.MediaType = desc.MediaType
	labels := map[string]string{}
	for i, m := range index.Manifests {
		labels[labelRefManifest+strconv.Itoa(i)] = m.Digest.String()
	}
	return v.write(ctx, desc, index, labels)
}

// takes tells whether a member of an index is taken, and for which platform it is, if that is known.
func (v *converter) takes(m ocispec.Descriptor, isImage bool) (bool, *ocispec.Platform, error) {
	p := m.Platform
	switch {
	case v.o.AllPlatforms:
		return true, p, nil
	case !isImage:
		return false, nil, nil
	case p == nil && isIndex(m.MediaType):
		return true, nil, nil
	case p == nil:
		n, err := v.node(m)
		if err != nil {
			return false, nil, err
		}
		own, err := v.platform(n)
		if err != nil {
			return false, nil, err
		}
		p = &own
	}
	return v.want.Match(*p), p, nil
}

func (v *converter) manifest(ctx context.Context, desc ocispec.Descriptor) (ocispec.Descriptor, error) {
	var m ocispec.Manifest
	if err := readJSON(ctx, v.c, desc, &m); err != nil {
		return desc, err
	}
	var ids []digest.Digest
	if isConfig(m.Config.MediaType) {
		var config ocispec.Image
		if err := readJSON(ctx, v.c, m.Config, &config); err != nil {
			return desc, err
		}
		if ids = config.RootFS.DiffIDs; len(ids) != len(m.Layers) {
			return desc, invalid("manifest %s has %d layers, its config has %d", desc.Digest, len(m.Layers), len(ids))
		}
	} else if _, err := v.c.Labels(ctx, m.Config.Digest); err != nil {
		return desc, fmt.Errorf("manifest %s lacks its config: %w", desc.Digest, err)
	}
	was := m.Layers
	m.Layers = make([]ocispec.Descriptor, len(was))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, l := range was {
		var id digest.Digest
		if ids != nil {
			id = ids[i]
		}
		g.Go(func() (err error) {
			m.Layers[i], err = v.layer(gctx, l, id)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return desc, err
	}
	changed := false
	for i, l := range m.Layers {
		changed = changed || l.Digest != was[i].Digest || l.MediaType != was[i].MediaType
	}
	if v.o.OCI {
		for _, t := range []struct {
			is *string
			to string
		}{{&desc.MediaType, ocispec.MediaTypeImageManifest}, {&m.Config.MediaType, ocispec.MediaTypeImageConfig}} {
			if *t.is != t.to && strings.HasPrefix(*t.is, "application/vnd.docker.") {
				*t.is, changed = t.to, true
			}
		}
	}
	if !changed {
		return desc, nil
	}
	m.MediaType = desc.MediaType
	labels := map[string]string{labelRefConfig: m.Config.Digest.String()}
	for i, l := range m.Layers {
		labels[labelRefLayer+strconv.Itoa(i)] = l.Digest.String()
	}
	return v.write(ctx, desc, m, labels)
}

// write keeps an index or a manifest in place of desc.
func (v *converter) write(ctx context.Context, desc ocispec.Descriptor, what any, labels map[string]string) (_ ocispec.Descriptor, err error) {
	data, err := json.MarshalIndent(what, "", "  ")
	if err != nil {
		return desc, err
	}
	desc.Digest, desc.Size, desc.Data = digest.FromBytes(data), int64(len(data)), nil
	w, err := v.c.Create(ctx, "convert-"+unique()+"-"+desc.Digest.String())
	if err != nil {
		return desc, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if _, err := w.Write(data); err != nil {
		return desc, err
	}
	return desc, w.Commit(ctx, desc.Size, desc.Digest, labels)
}

// layer makes one layer what it is to be. id, if not empty, is what must be inside.
func (v *converter) layer(ctx context.Context, l ocispec.Descriptor, id digest.Digest) (ocispec.Descriptor, error) {
	if !Distributable(l.MediaType) {
		l.MediaType = v.layerType(l.MediaType)
		return l, nil
	}
	if v.o.Layers == nil || !diff.IsLayer(l.MediaType) {
		if _, err := v.c.Labels(ctx, l.Digest); err != nil {
			return l, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		l.MediaType = v.layerType(l.MediaType)
		return l, nil
	}
	v.mu.Lock()
	p := v.layers[l.Digest]
	if p == nil {
		p = &packing{}
		v.layers[l.Digest] = p
	}
	v.mu.Unlock()
	p.once.Do(func() { p.desc, p.id, p.err = pack(ctx, v.c, l, *v.o.Layers) })
	if p.err != nil {
		return l, fmt.Errorf("layer %s: %w", l.Digest, p.err)
	}
	if id != "" && p.id != id {
		return l, invalid("layer %s holds %s, the image's config says %s", l.Digest, p.id, id)
	}
	l.MediaType = v.packedType(l.MediaType, *v.o.Layers)
	if p.desc.Digest != l.Digest {
		l.Digest, l.Size, l.Data = p.desc.Digest, p.desc.Size, nil
		l.Annotations = maps.Clone(l.Annotations)
		maps.DeleteFunc(l.Annotations, func(k, _ string) bool { // of how the blob was packed
			return strings.HasPrefix(k, "io.github.containers.zstd-chunked.") || strings.HasPrefix(k, "containerd.io/snapshot/stargz/") ||
				strings.HasPrefix(k, "io.containers.zstd-chunked.") || strings.HasPrefix(k, "io.containers.estargz.")
		})
	}
	return l, nil
}

// The media types of layers, without how they are packed.
const (
	dockerLayer   = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeign = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	ociForeign    = "application/vnd.oci.image.layer.nondistributable.v1.tar"
)

// layerType is what the media type of a layer that is not packed anew becomes.
func (v *converter) layerType(was string) string {
	if !v.o.OCI {
		return was
	}
	if packed, ok := strings.CutPrefix(was, dockerLayer); ok {
		return ocispec.MediaTypeImageLayer + strings.Replace(packed, ".", "+", 1)
	}
	if packed, ok := strings.CutPrefix(was, dockerForeign); ok {
		return ociForeign + strings.Replace(packed, ".", "+", 1)
	}
	return was
}

// packedType is what that of one that was packed becomes.
func (v *converter) packedType(was string, packed diff.Compression) string {
	switch {
	case v.o.OCI || !strings.HasPrefix(was, dockerLayer):
		return diff.LayerType(packed)
	case packed == diff.None:
		return dockerLayer
	}
	return dockerLayer + "." + string(packed)
}

// pack packs a layer, unless it is packed so already, and tells what is inside.
func pack(ctx context.Context, c Content, l ocispec.Descriptor, as diff.Compression) (out ocispec.Descriptor, id digest.Digest, err error) {
	r, err := c.Open(ctx, l)
	if err != nil {
		return out, "", err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	whole := l.Digest.Verifier()
	in := io.TeeReader(r, whole)
	plain, packed, err := diff.Decompress(in)
	if err != nil {
		return out, "", err
	}
	defer func() { err = errors.Join(err, plain.Close()) }()
	inside := digest.Canonical.Digester()
	// verified reads what is left, and checks what was read.
	verified := func() error {
		if _, err := io.Copy(io.Discard, in); err != nil {
			return err
		}
		if !whole.Verified() {
			return fmt.Errorf("its blob is damaged: the digest is another one: %w", errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	if packed == as {
		if _, err := io.Copy(inside.Hash(), plain); err != nil {
			return out, "", err
		}
		return l, inside.Digest(), verified()
	}
	w, err := c.Create(ctx, "convert-"+unique()+"-"+l.Digest.String())
	if err != nil {
		return out, "", err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	count := &written{w: w}
	b := bufio.NewWriterSize(count, 1<<20)
	z, err := diff.Compress(as, b)
	if err != nil {
		return out, "", err
	}
	_, err = io.Copy(io.MultiWriter(z, inside.Hash()), plain)
	if cerr := z.Close(); err == nil { // also after an error: it may have goroutines
		err = cerr
	}
	if err == nil {
		err = b.Flush()
	}
	if err == nil {
		err = verified()
	}
	if err != nil {
		return out, "", err
	}
	labels := map[string]string{}
	if as != diff.None {
		labels[diff.LabelUncompressed] = inside.Digest().String()
	}
	out = ocispec.Descriptor{Digest: w.Digest(), Size: count.n}
	return out, inside.Digest(), w.Commit(ctx, out.Size, out.Digest, labels)
}

// written counts what is written.
type written struct {
	w io.Writer
	n int64 // bytes
}

func (c *written) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
