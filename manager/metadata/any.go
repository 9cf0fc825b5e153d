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
