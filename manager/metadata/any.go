package metadata

import (
	"google.golang.org/protobuf/types/known/anypb"

	records "github.com/managerd/managerd/protos/metadata"
)

// FromAny and ToAny translate between the wire's Any and the records'; nil stays nil.
func FromAny(a *anypb.Any) *records.Any {
	if a == nil {
		return nil
	}
	return &records.Any{TypeUrl: a.TypeUrl, Value: a.Value}
}

// ToAny is the inverse of FromAny.
func ToAny(a *records.Any) *anypb.Any {
	if a == nil {
		return nil
	}
	return &anypb.Any{TypeUrl: a.TypeUrl, Value: a.Value}
}

// With sets key in a copy of m; the zero value removes it. It is how a field mask like labels.KEY changes a map.
func With[V comparable](m map[string]V, key string, v V) map[string]V {
	out := make(map[string]V, len(m)+1)
	for k, old := range m {
		out[k] = old
	}
	var zero V
	if out[key] = v; v == zero {
		delete(out, key)
	}
	return out
}
