// Package wish is what a client of ours may want of a transfer that containerd's messages have no place for: a header of
// the request. A daemon that does not know it does without.
package wish

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/metadata"
)

// header is its name; its value is JSON, which gRPC encodes for its sake.
const header = "managerd-transfer-bin"

// maxConcurrent bounds Wish.Concurrent.
const maxConcurrent = 1000

// Wish is what is wanted. Its zero value is nothing.
type Wish struct {
	// MetadataOnly has a pull take manifests and configs, for all platforms, and no layers.
	MetadataOnly bool `json:"metadata_only,omitempty"`
	// Foreign has a push send layers that are not to be distributed, too.
	Foreign bool `json:"foreign,omitempty"`
	// Concurrent is how many layers are moved at the same time; 0: as the daemon is configured.
	Concurrent int `json:"concurrent,omitempty"`
	// Target is the manifest or index that is pushed, by media type and digest, instead of an image's.
	Target *ocispec.Descriptor `json:"target,omitempty"`
}

// With is ctx for a request that wants w.
func With(ctx context.Context, w Wish) (context.Context, error) {
	if w == (Wish{}) {
		return ctx, nil
	}
	data, err := json.Marshal(w)
	if err != nil {
		return nil, err
	}
	return metadata.AppendToOutgoingContext(ctx, header, string(data)), nil
}

// From is what the request of ctx wants. InvalidArgument for what is not known here: it must not be passed over.
func From(ctx context.Context) (w Wish, err error) {
	for _, v := range metadata.ValueFromIncomingContext(ctx, header) {
		d := json.NewDecoder(bytes.NewReader([]byte(v)))
		d.DisallowUnknownFields()
		if err := d.Decode(&w); err != nil {
			return w, fmt.Errorf("header %s: %w: %w", header, err, errdefs.ErrInvalidArgument)
		}
	}
	if w.Concurrent < 0 || w.Concurrent > maxConcurrent {
		return w, fmt.Errorf("%d layers at the same time: it is 1 to %d, or 0 for what is configured: %w", w.Concurrent, maxConcurrent, errdefs.ErrInvalidArgument)
	}
	return w, nil
}
