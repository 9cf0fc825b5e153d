package diff

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Compression is how a stream is packed: "", "gzip" or "zstd".
type Compression string

// The compressions.
const (
	None Compression = ""
	Gzip Compression = "gzip"
	Zstd Compression = "zstd"
)

const none, gzipped, zstded = None, Gzip, Zstd

// The media types of layers, and how to pack them. On the way in only the stream itself counts: images with media
// types that lie are in the wild.
var layerTypes = map[string]Compression{
	ocispec.MediaTypeImageLayer:                                    none,
	ocispec.MediaTypeImageLayerGzip:                                gzipped,
	ocispec.MediaTypeImageLayerZstd:                                zstded,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      none,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": gzipped,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": zstded,
	"application/vnd.docker.image.rootfs.diff.tar":                 none,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            gzipped,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            zstded,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         none,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    gzipped,
}

// IsLayer tells whether Apply takes blobs of this media type.
func IsLayer(mediaType string) bool {
	mediaType, _, _ = strings.Cut(mediaType, ";")
	_, ok := layerTypes[mediaType]
	return ok
}

// The largest window that a zstd stream may ask for, in bytes: what "zstd --long" makes.
const maxWindow = 128 << 20

// Decompress finds out how r is packed and unpacks it. Closing the result does not close r. A stream that is cut short
// or damaged gives errors that wrap InvalidArgument; what follows the packed stream, too.
func Decompress(r io.Reader) (io.ReadCloser, Compression, error) {
	b := bufio.NewReaderSize(r, 128<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, none, err
	}
	switch Detect(magic) {
	case gzipped:
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, gzipped, damaged(gzipped, err)
		}
		return &unpacker{z, z.Close, gzipped}, gzipped, nil
	case zstded:
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, zstded, damaged(zstded, err)
		}
		return &unpacker{z, func() error { z.Close(); return nil }, zstded}, zstded, nil
	}
	return io.NopCloser(b), none, nil
}

type unpacker struct {
	r     io.Reader
	close func() error
	c     Compression
}

func (u *unpacker) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = damaged(u.c, err)
	}
	return n, err
}

func (u *unpacker) Close() error { return u.close() }

func damaged(c Compression, err error) error {
	var failed *ProcessorError
	var input inputError
	if errors.As(err, &failed) || errors.As(err, &input) {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return fmt.Errorf("the %s stream is cut short: %w: %w", c, io.ErrUnexpectedEOF, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("the %s stream is damaged: %w: %w", c, err, errdefs.ErrInvalidArgument)
}

// Compress packs what is written to the result into w. Closing the result ends the stream, and does not close w.
func Compress(c Compression, w io.Writer) (io.WriteCloser, error) {
	switch c {
	case gzipped:
		return gzip.NewWriter(w), nil
	case zstded:
		return zstd.NewWriter(w)
	}
	return nopCloser{w}, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func unique() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// LayerType is the media type of a layer that is packed so.
func LayerType(c Compression) string {
	switch c {
	case gzipped:
		return ocispec.MediaTypeImageLayerGzip
	case zstded:
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}

// Detect tells by its first bytes how a stream is packed.
func Detect(head []byte) Compression {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzipped
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18}): // skippable frame
		return zstded
	}
	return none
}
