// Package api is containerd's gRPC API: one file a service, each a translation between the wire and a domain package,
// and one table that turns errors into statuses. It decides nothing.
package api

import (
	"context"

	"google.golang.org/protobuf/proto"
)

// Publisher is told of changes that clients subscribe to.
type Publisher interface {
	Publish(ctx context.Context, topic string, event proto.Message) error
}
