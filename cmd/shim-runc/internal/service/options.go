package service

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/shimapi"
)

// decodeOptions reads containerd.runc.v1.Options, or the same as TOML in a runtimeoptions.v1.Options; none is the default.
// What cannot be honoured is refused: InvalidArgument, or NotImplemented.
func decodeOptions(any *anypb.Any) (*options.Options, error) {
	if any == nil || any.GetTypeUrl() == "" {
		return &options.Options{}, nil
	}
	v, err := typeurl.UnmarshalAny(any)
	if err != nil {
		return nil, fmt.Errorf("cannot read runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var opts *options.Options
	switch v := v.(type) {
	case *options.Options:
		opts = v
	case *runtimeoptions.Options:
		if opts, err = decodeTOML(v); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("runtime options are a %s, not containerd.runc.v1.Options: %w", any.GetTypeUrl(), errdefs.ErrInvalidArgument)
	}
	//lint:ignore SA1019 a client may send it all the same
	if address := opts.TaskApiAddress; address != "" {
		return nil, fmt.Errorf("runtime option TaskApiAddress %q: a shim of this kind keeps its container itself: %w", address, errdefs.ErrNotImplemented)
	}
	//lint:ignore SA1019 a client may send it all the same
	if v := opts.TaskApiVersion; v != 0 {
		return nil, fmt.Errorf("runtime option TaskApiVersion %d: it is for a TaskApiAddress, and a shim of this kind keeps its container itself: %w", v, errdefs.ErrNotImplemented)
	}
	return opts, nil
}

// decodeTOML reads the options from the body or, without one, from the file that it names. Its keys are those of
// containerd's configuration (BinaryName, SystemdCgroup, ...); one that is not known is refused.
func decodeTOML(r *runtimeoptions.Options) (*options.Options, error) {
	body, from := r.ConfigBody, "ConfigBody"
	if len(body) == 0 && r.ConfigPath != "" {
		var err error
		from = r.ConfigPath
		if body, err = os.ReadFile(r.ConfigPath); err != nil {
			return nil, fmt.Errorf("cannot read runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	var c struct {
		NoPivotRoot, NoNewKeyring, SystemdCgroup                  bool
		ShimCgroup, BinaryName, Root, CriuImagePath, CriuWorkPath string
		IoUid, IoGid                                              uint32
	}
	if err := toml.NewDecoder(bytes.NewReader(body)).DisallowUnknownFields().Decode(&c); err != nil {
		return nil, fmt.Errorf("cannot read runtime options from %s: %w: %w", from, err, errdefs.ErrInvalidArgument)
	}
	return &options.Options{
		NoPivotRoot: c.NoPivotRoot, NoNewKeyring: c.NoNewKeyring, SystemdCgroup: c.SystemdCgroup, ShimCgroup: c.ShimCgroup,
		BinaryName: c.BinaryName, Root: c.Root, CriuImagePath: c.CriuImagePath, CriuWorkPath: c.CriuWorkPath,
		IoUid: c.IoUid, IoGid: c.IoGid,
	}, nil
}

// StateRoot is libcontainer's state directory: in the bundle, or where the runtime options say.
func StateRoot(bundle, ns string, opts *options.Options) string {
	if opts.GetRoot() != "" {
		return filepath.Join(opts.Root, ns)
	}
	return filepath.Join(bundle, shimapi.EngineDir)
}

// keepOptions writes the options down for whoever cleans up after this process.
func (s *Service) keepOptions(opts *options.Options) error {
	data, err := protojson.Marshal(opts)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.cfg.Bundle, shimapi.OptionsFile), data, 0o600)
}

// KeptOptions reads what keepOptions wrote; none is the default.
func KeptOptions(bundle string) *options.Options {
	opts := &options.Options{}
	if data, err := os.ReadFile(filepath.Join(bundle, shimapi.OptionsFile)); err == nil {
		_ = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(data, opts)
	}
	return opts
}
