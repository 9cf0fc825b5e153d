package diff

import (
	"encoding/json"
	"maps"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// decoderID begins the IDs of ocicrypt's decoders (containerd's docs/cri/decryption.md). Their keys are wrapped in
	// annotations of the layer, so they have to be given its descriptor.
	decoderID = "io.containerd.ocicrypt.decoder.v1."
	// decoderPayload is the type of that: JSON of imgcrypt's Payload.
	decoderPayload = "io.containerd.ocicrypt.v1.Payload"
)

// withDecoders gives the decoders of a chain for which there is no payload one that has the descriptor, and no keys: they
// have those of the node.
func (p Processors) withDecoders(desc ocispec.Descriptor, payloads map[string]*anypb.Any) (map[string]*anypb.Any, error) {
	out := maps.Clone(payloads)
	for _, one := range p {
		if !strings.HasPrefix(one.ID, decoderID) || out[one.ID] != nil {
			continue
		}
		data, err := json.Marshal(struct {
			DecryptConfig struct{ Parameters map[string][][]byte }
			Descriptor    ocispec.Descriptor
		}{Descriptor: desc})
		if err != nil {
			return nil, err
		}
		if out == nil {
			out = map[string]*anypb.Any{}
		}
		out[one.ID] = &anypb.Any{TypeUrl: decoderPayload, Value: data}
	}
	return out, nil
}
