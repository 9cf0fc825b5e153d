package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/diff"
)

// ImportOptions says how images are named.
type ImportOptions struct {
	// Base names images whose names in the archive are tags only (Base:TAG), or that have none (Base@DIGEST). Empty:
	// import-DATE.
	Base string
	// Index, if not empty, is a further name, for the archive as a whole.
	Index string
	// Digests names every image Base@DIGEST, too, or with SkipNamed only those without a full name in the archive.
	Digests, SkipNamed bool
	// Labels for the images.
	Labels map[string]string
	// Names, if not nil, names images instead of Base. named is the name that the archive has for one, in full, or else tag
	// its tag; both may be empty.
	Names func(named, tag string, target ocispec.Descriptor) []string
	// Compress packs the plain layers of docker save with gzip. Those of an OCI layout stay what its manifests name.
	Compress bool
}

func (o *ImportOptions) names(d ocispec.Descriptor) ([]string, error) {
	if o.Names == nil {
		names, full, err := imageNames(d, o.Base)
		if byDigest := o.Base + "@" + d.Digest.String(); o.Digests && !(full && o.SkipNamed) && !slices.Contains(names, byDigest) {
			names = append(names, byDigest)
		}
		return names, err
	}
	name, tag, err := named(d)
	if err != nil {
		return nil, err
	}
	return o.Names(name, tag, d), nil
}

// Import reads the tar (plain, gzip or zstd) of an OCI layout, or of docker save, to its end, and gives the images it
// held, in order. Every blob is verified by its digest. A context with a lease keeps what is written from being
// collected meanwhile; when Import fails that is all that keeps it. InvalidArgument for an archive that is malformed,
// incomplete or cut short; FailedPrecondition for a blob that is not what its digest says.
func Import(ctx context.Context, c Content, images Images, r io.Reader, o ImportOptions) ([]Image, error) {
	out, err := importAll(ctx, c, images, r, o)
	if err != nil {
		return nil, fmt.Errorf("cannot import archive: %w", err)
	}
	return out, nil
}

func importAll(ctx context.Context, c Content, images Images, r io.Reader, o ImportOptions) ([]Image, error) {
	if o.Base == "" {
		o.Base = "import-" + time.Now().Format(time.DateOnly)
	}
	packed := &counting{r: r}
	stream, _, err := diff.Decompress(packed)
	if err != nil {
		return nil, err
	}
	defer func() { _ = stream.Close() }()
	plain := &inflated{counting: counting{r: stream}, packed: packed}
	im := &importer{
		ctx: ctx, content: c, prefix: "import-" + unique() + "-",
		json: map[string][]byte{}, blobs: map[string]blob{}, links: map[string]string{}, compress: o.Compress, packed: map[digest.Digest]blob{},
	}
	if err := im.read(plain); err != nil {
		return nil, err
	}
	// What follows a tar is padding; reading it finds a stream that is cut short or damaged.
	if n, err := io.Copy(io.Discard, io.LimitReader(plain, maxPadding)); err != nil {
		return nil, err
	} else if n == maxPadding {
		return nil, invalid("%d bytes and more follow its end", maxPadding)
	}

	var index ocispec.Index
	switch {
	case im.json[ocispec.ImageIndexFile] != nil:
		if err := im.layout(); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(im.json[ocispec.ImageIndexFile], &index); err != nil {
			return nil, invalid("%s is malformed: %w", ocispec.ImageIndexFile, err)
		}
	case im.json[dockerManifestFile] != nil:
		if index, err = im.docker(); err != nil {
			return nil, err
		}
	default:
		return nil, invalid("it has neither %s nor %s: no image archive", ocispec.ImageIndexFile, dockerManifestFile)
	}
	if len(index.Manifests) == 0 {
		return nil, invalid("it has no images")
	}
	var out []Image
	taken := map[string]bool{}
	l := newLinker(ctx, c)
	for _, m := range index.Manifests {
		if err := l.link(m, 0); err != nil {
			return nil, err
		}
		names, err := o.names(m)
		if err != nil {
			return nil, err
		}
		target := m
		target.Annotations = nil // they speak of this archive
		for _, name := range names {
			if !taken[name] {
				taken[name] = true
				out = append(out, Image{Name: name, Target: target})
			}
		}
	}
	if o.Index != "" {
		target, err := im.putIndex(index)
		if err != nil {
			return nil, err
		}
		out = append(out, Image{Name: o.Index, Target: target})
	}
	for _, i := range out {
		if err := images.Put(ctx, i.Name, i.Target, o.Labels); err != nil {
			return nil, fmt.Errorf("cannot name image %s: %w", i.Name, err)
		}
	}
	return out, nil
}

const dockerManifestFile = "manifest.json"

// What an archive of a stranger may be.
const (
	maxEntries = 1_000_000
	maxPadding = 64 << 20 // bytes behind its end
	maxRatio   = 10_000   // bytes that it becomes for one when it is unpacked,
	ratioFrom  = 1 << 30  // once there are so many
)

// counting counts what is read.
type counting struct {
	r io.Reader
	n int64 // bytes
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// inflated is an unpacked archive, as long as it is none that a few bytes make large.
type inflated struct {
	counting
	packed *counting
}

func (i *inflated) Read(p []byte) (int, error) {
	n, err := i.counting.Read(p)
	if i.n > ratioFrom && i.n/maxRatio > i.packed.n {
		return 0, fmt.Errorf("it becomes %d bytes out of %d, more than %d times as many: %w", i.n, i.packed.n, maxRatio, errdefs.ErrResourceExhausted)
	}
	return n, err
}

type importer struct {
	ctx     context.Context
	content Content
	prefix  string // of the references of our writes

	json  map[string][]byte // the files that describe the archive
	blobs map[string]blob   // by path
	links map[string]string // symbolic and hard ones, as old docker save has them for layers it has twice

	compress bool                   // see ImportOptions
	packed   map[digest.Digest]blob // what was made of plain layers
}

type blob struct {
	desc ocispec.Descriptor
	kind diff.Compression
}

func (im *importer) read(r io.Reader) error {
	in := tar.NewReader(r)
	for entries := 1; ; entries++ {
		if err := im.ctx.Err(); err != nil {
			return err
		}
		h, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF):
			return invalid("it is cut short: %w", err)
		case errors.Is(err, tar.ErrHeader):
			return invalid("it is no tar: %w", err)
		case err != nil:
			return err
		}
		if entries > maxEntries {
			return invalid("it has more than %d entries", maxEntries)
		}
		if err := im.entry(h, in); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) && !errdefs.IsInvalidArgument(err) {
				err = invalid("the archive is cut short: %w", err)
			}
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
}

func (im *importer) entry(h *tar.Header, body io.Reader) error {
	name := path.Clean(h.Name)
	if path.IsAbs(h.Name) || name == ".." || strings.HasPrefix(name, "../") {
		return invalid("the name leaves the archive")
	}
	switch h.Typeflag {
	case tar.TypeDir, tar.TypeXGlobalHeader:
		return nil
	case tar.TypeSymlink, tar.TypeLink:
		target := h.Linkname
		if path.IsAbs(target) {
			return invalid("its target %q is absolute", target)
		}
		if h.Typeflag == tar.TypeSymlink {
			target = path.Join(path.Dir(name), target)
		}
		if target = path.Clean(target); target == ".." || strings.HasPrefix(target, "../") {
			return invalid("its target %q leaves the archive", h.Linkname)
		}
		im.links[name] = target
		return nil
	case tar.TypeReg:
	default:
		return invalid("its type %q has no place in an image archive", h.Typeflag)
	}
	switch {
	case name == ocispec.ImageIndexFile, name == ocispec.ImageLayoutFile, name == dockerManifestFile:
		if im.json[name] != nil {
			return invalid("it is there twice")
		}
		data, err := readAll(body, name)
		im.json[name] = data
		return err
	case name == "repositories", path.Base(name) == "VERSION", path.Base(name) == "json":
		return nil // of docker's first format, long superseded
	}
	desc := ocispec.Descriptor{Size: h.Size}
	if rest, ok := strings.CutPrefix(name, ocispec.ImageBlobsDir+"/"); ok {
		alg, hexed, ok := strings.Cut(rest, "/")
		desc.Digest = digest.NewDigestFromEncoded(digest.Algorithm(alg), hexed)
		if err := desc.Digest.Validate(); !ok || err != nil {
			return invalid("the name is none of a blob")
		}
	}
	return im.put(name, desc, body)
}

// put writes a blob to the content store; a digest that is given is verified.
func (im *importer) put(name string, desc ocispec.Descriptor, body io.Reader) (err error) {
	sniff := &sniffer{r: body}
	if desc.Digest != "" {
		if err := im.content.Keep(im.ctx, desc.Digest); err == nil {
			if _, err := io.ReadFull(sniff, make([]byte, min(desc.Size, sniffLen))); err != nil {
				return err
			}
			im.blobs[name] = blob{desc, sniff.kind()}
			return nil
		} else if !errdefs.IsNotFound(err) {
			return err
		}
	}
	if desc.Digest != "" && desc.Digest.Algorithm() != digest.Canonical {
		return invalid("blobs of %s are not supported, only of %s", desc.Digest.Algorithm(), digest.Canonical)
	}
	w, err := im.content.Create(im.ctx, im.prefix+strings.ReplaceAll(name, "/", "-"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, sniff, make([]byte, 512<<10))
	if err != nil {
		return err
	}
	if n != desc.Size {
		return invalid("it has %d bytes, its header says %d", n, desc.Size)
	}
	got := w.Digest()
	if desc.Digest != "" && got != desc.Digest {
		return fmt.Errorf("its digest is %s: %w", got, errdefs.ErrFailedPrecondition)
	}
	if desc.Digest = got; n == 0 {
		return invalid("it is empty")
	}
	if err := w.Commit(im.ctx, n, got, nil); err != nil {
		return err
	}
	im.blobs[name] = blob{desc, sniff.kind()}
	return nil
}

// sniffer looks at how a blob begins, to know how it is packed.
type sniffer struct {
	r    io.Reader
	head []byte
}

const sniffLen = 512

func (s *sniffer) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if room := sniffLen - len(s.head); room > 0 {
		s.head = append(s.head, p[:min(n, room)]...)
	}
	return n, err
}

func (s *sniffer) kind() diff.Compression { return diff.Detect(s.head) }

func (im *importer) layout() error {
	raw := im.json[ocispec.ImageLayoutFile]
	if raw == nil {
		return invalid("it has %s but no %s", ocispec.ImageIndexFile, ocispec.ImageLayoutFile)
	}
	var l ocispec.ImageLayout
	if err := json.Unmarshal(raw, &l); err != nil {
		return invalid("%s is malformed: %w", ocispec.ImageLayoutFile, err)
	}
	if l.Version != ocispec.ImageLayoutVersion {
		return invalid("version %q of its OCI layout is not known", l.Version)
	}
	return nil
}

// putJSON stores what the archive does not have by itself.
func (im *importer) putJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, im.put("made-"+desc.Digest.Encoded(), desc, bytes.NewReader(data))
}

func (im *importer) putIndex(index ocispec.Index) (ocispec.Descriptor, error) {
	index.SchemaVersion, index.MediaType = 2, ocispec.MediaTypeImageIndex
	desc, err := im.putJSON(ocispec.MediaTypeImageIndex, index)
	if err != nil {
		return desc, err
	}
	return desc, newLinker(im.ctx, im.content).link(desc, 0)
}

func unique() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
