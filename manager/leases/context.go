package leases

import (
	"context"

	"google.golang.org/grpc/metadata"
)

// Header is the gRPC metadata key that carries the lease of a request.
const Header = "containerd-lease"

type contextKey struct{}

// With returns a context whose work is kept by lease id, for our own code and for outgoing calls.
func With(ctx context.Context, id string) context.Context {
	ctx = context.WithValue(ctx, contextKey{}, id)
	md, ok := metadata.FromOutgoingContext(ctx)
	if ok {
		md = md.Copy()
	} else {
		md = metadata.MD{}
	}
	md.Set(Header, id)
	return metadata.NewOutgoingContext(ctx, md)
}

// From finds the lease of ctx: set by With, or sent by the client of the call that is being served.
func From(ctx context.Context) (string, bool) {
	if id, ok := ctx.Value(contextKey{}).(string); ok {
		return id, id != ""
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		if v := md.Get(Header); len(v) > 0 && v[0] != "" {
			return v[0], true
		}
	}
	return "", false
}
