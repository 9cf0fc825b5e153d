package shimapi

import (
	"fmt"
	"strings"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// An endpoint is a task API that somebody serves already, for one container or several: a client names it, as TaskApiAddress and
// TaskApiVersion of containerd.runc.v1.Options or of the request, and the daemon makes the task there instead of spawning
// a shim.

// Endpoint reads where a task API is served: "unix:///path", "vsock://CID:PORT", either with "ttrpc+" before it, or "/path", and
// its version, 2 or 3. Errors
// are InvalidArgument, or NotImplemented for a transport or protocol that this house does not speak.
func Endpoint(address string, version uint32) (BootstrapParams, error) {
	fail := func(err error) (BootstrapParams, error) {
		return BootstrapParams{}, fmt.Errorf("task API address %q, version %d: %w", clip([]byte(address)), version, err)
	}
	path := strings.TrimPrefix(address, "ttrpc+")
	scheme, _, uri := strings.Cut(path, "://")
	switch {
	case version != 2 && version != 3:
		return fail(fmt.Errorf("the version must be 2 or 3: %w", errdefs.ErrInvalidArgument))
	case uri && scheme == "vsock":
	case uri && scheme != "unix":
		return fail(fmt.Errorf("%s is not supported, only ttrpc on a unix or vsock socket: %w", scheme, errdefs.ErrNotImplemented))
	case !strings.HasPrefix(strings.TrimPrefix(path, "unix://"), "/"):
		return fail(fmt.Errorf("not the absolute path of a socket, write unix:///path: %w", errdefs.ErrInvalidArgument))
	}
	if !uri {
		path = "unix://" + path
	}
	p := BootstrapParams{Version: int(version), Address: path, Protocol: "ttrpc"}
	if err := p.check(); err != nil {
		return fail(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
	}
	return p, nil
}

// TaskAPI is the endpoint that runtime options name, with the options without it: it means something to the daemon, and nothing
// to the shim that keeps the container. The address is empty when they name none; options of another type stay as they are.
func TaskAPI(o *anypb.Any) (address string, version uint32, rest *anypb.Any, err error) {
	opts := &options.Options{}
	if !o.MessageIs(opts) && strings.TrimPrefix(o.GetTypeUrl(), "/") != string(opts.ProtoReflect().Descriptor().FullName()) {
		return "", 0, o, nil
	}
	if err := proto.Unmarshal(o.Value, opts); err != nil {
		return "", 0, nil, fmt.Errorf("cannot read runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	//lint:ignore SA1019 clients send it all the same
	address, version = opts.TaskApiAddress, opts.TaskApiVersion
	//lint:ignore SA1019 as above
	opts.TaskApiAddress, opts.TaskApiVersion = "", 0
	value, err := proto.Marshal(opts)
	if err != nil {
		return "", 0, nil, err
	}
	return address, version, &anypb.Any{TypeUrl: o.TypeUrl, Value: value}, nil
}
