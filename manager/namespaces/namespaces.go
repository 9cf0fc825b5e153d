// Package namespaces carries the containerd namespace of a request in its context, and on the wire in the header that
// containerd's clients send. It must not know what a namespace contains.
package namespaces

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/metadata"

	"github.com/managerd/managerd/manager/identifiers"
)

const (
	// Header is the gRPC metadata key.
	Header = "containerd-namespace"
	// TTRPCHeader is the ttrpc metadata key.
	TTRPCHeader = "containerd-namespace-ttrpc"
	// Default is what command line clients use when none is named.
	Default = "default"
)

type contextKey struct{}

// With returns a context that carries ns, for our own code and for outgoing gRPC and ttrpc calls.
func With(ctx context.Context, ns string) context.Context {
	ctx = context.WithValue(ctx, contextKey{}, ns)
	md, ok := metadata.FromOutgoingContext(ctx)
	if ok {
		md = md.Copy()
	} else {
		md = metadata.MD{}
	}
	md.Set(Header, ns)
	ctx = metadata.NewOutgoingContext(ctx, md)
	tmd := ttrpc.MD{}
	if old, ok := ttrpc.GetMetadata(ctx); ok {
		for k, v := range old {
			tmd[k] = v
		}
	}
	tmd.Set(TTRPCHeader, ns)
	return ttrpc.WithMetadata(ctx, tmd)
}

// From finds the namespace of ctx: set by With, or sent by the client of the call that is being served.
func From(ctx context.Context) (string, bool) {
	if ns, ok := ctx.Value(contextKey{}).(string); ok {
		return ns, ns != ""
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		if v := md.Get(Header); len(v) > 0 && v[0] != "" {
			return v[0], true
		}
	}
	if v, ok := ttrpc.GetMetadataValue(ctx, TTRPCHeader); ok && v != "" {
		return v, true
	}
	return "", false
}

// Required is From with an error: FailedPrecondition when there is none, InvalidArgument when it is malformed.
func Required(ctx context.Context) (string, error) {
	ns, ok := From(ctx)
	if !ok {
		return "", fmt.Errorf("namespace is required: send the %s header: %w", Header, errdefs.ErrFailedPrecondition)
	}
	if err := identifiers.Validate(ns); err != nil {
		return "", fmt.Errorf("namespace: %w", err)
	}
	return ns, nil
}
