package api_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/introspection"
)

// TestIntrospection asks without a namespace, as clients do.
func TestIntrospection(t *testing.T) {
	reg := &introspection.Registry{}
	for _, p := range []introspection.Plugin{
		{Type: introspection.TypeContent, ID: "content", Exports: map[string]string{"root": "/x"}, Requires: []string{introspection.TypeMetadata}},
		{Type: introspection.TypeSnapshotter, ID: "overlayfs", Platforms: []string{"linux/arm64/v8", "no platform"}, Capabilities: []string{"remap-ids", "rebase"}},
		{Type: introspection.TypeSnapshotter, ID: "zfs", Err: fmt.Errorf("no zfs here: %w", errdefs.ErrNotImplemented)},
		{Type: introspection.TypeRuntime, ID: "task", Err: errors.New("broken")},
	} {
		reg.Add(p)
	}
	info := func(_ context.Context, path string, options *anypb.Any) (*types.RuntimeInfo, error) {
		if path == "missing" {
			return nil, fmt.Errorf("runtime %q: %w", path, errdefs.ErrNotFound)
		}
		return &types.RuntimeInfo{Name: path, Options: options}, nil
	}
	_, conn := serve(t, func(_ string, s *grpc.Server) {
		api.NewIntrospection(reg, "the-uuid", info).Register(s)
		api.NewVersion("v1.2", "abc").Register(s)
	})
	ctx := context.Background()
	c := introspectionapi.NewIntrospectionClient(conn)
	for filters, want := range map[string]string{
		"": "content overlayfs zfs task", "type==io.containerd.snapshotter.v1, id==overlayfs": "overlayfs", "id==content;id==task": "content task", "id==restart": "",
		"type~=snapshotter": "overlayfs zfs", "capabilities~=rebase": "overlayfs", "platforms": "overlayfs",
	} {
		var fs []string
		if filters != "" {
			fs = strings.Split(filters, ";")
		}
		resp, err := c.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: fs})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range resp.Plugins {
			got = append(got, p.ID)
			code, says := codes.Code(p.InitErr.GetCode()), p.InitErr.GetMessage()
			switch p.ID {
			case "content":
				if p.InitErr != nil || p.Exports["root"] != "/x" || len(p.Requires) != 1 {
					t.Errorf("%v", p)
				}
			case "overlayfs":
				if p.InitErr != nil || len(p.Platforms) != 1 || p.Platforms[0].Architecture != "arm64" || len(p.Capabilities) != 2 {
					t.Errorf("%v", p)
				}
			case "zfs":
				if code != codes.Unimplemented || !strings.HasSuffix(says, "skip plugin") || !strings.Contains(says, "no zfs here") {
					t.Errorf("%v", p)
				}
			case "task":
				if code != codes.Unknown || says != "broken" {
					t.Errorf("%v", p)
				}
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: %v, want %s", filters, got, want)
		}
	}
	_, err := c.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: []string{"id="}})
	wantCode(t, err, codes.InvalidArgument, "filter")

	s, err := c.Server(ctx, &emptypb.Empty{})
	if err != nil || s.UUID != "the-uuid" || s.Pid != uint64(os.Getpid()) || s.Pidns == 0 {
		t.Errorf("%v, %v", s, err)
	}
	v, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil || v.Version != "v1.2" || v.Revision != "abc" {
		t.Errorf("%v, %v", v, err)
	}

	ask := func(typ, id string, options *anypb.Any) (*introspectionapi.PluginInfoResponse, error) {
		return c.PluginInfo(ctx, &introspectionapi.PluginInfoRequest{Type: typ, ID: id, Options: options})
	}
	request := func(path string) *anypb.Any {
		a, err := typeurl.MarshalAnyToProto(&types.RuntimeRequest{RuntimePath: path})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	p, err := ask(introspection.TypeSnapshotter, "zfs", nil)
	if err != nil || p.Plugin.ID != "zfs" || p.Plugin.InitErr == nil || p.Extra != nil {
		t.Errorf("%v, %v", p, err)
	}
	p, err = ask(introspection.TypeRuntime, "task", request("io.containerd.runc.v2"))
	if err != nil {
		t.Fatal(err)
	}
	var got types.RuntimeInfo
	if err := typeurl.UnmarshalTo(p.Extra, &got); err != nil || got.Name != "io.containerd.runc.v2" {
		t.Errorf("%v, %v", p, err)
	}
	_, err = ask(introspection.TypeRuntime, "task", request("missing"))
	wantCode(t, err, codes.NotFound, `"missing"`)
	_, err = ask(introspection.TypeRuntime, "other", nil)
	wantCode(t, err, codes.NotFound, "io.containerd.runtime.v2.other")
	_, err = ask(introspection.TypeSnapshotter, "zfs", request("x"))
	wantCode(t, err, codes.InvalidArgument, "cannot be asked")
	_, err = ask(introspection.TypeRuntime, "task", &anypb.Any{TypeUrl: "x"})
	wantCode(t, err, codes.InvalidArgument, "cannot be asked for x")
	bad := request("x")
	bad.Value = []byte{0xff}
	_, err = ask(introspection.TypeRuntime, "task", bad)
	wantCode(t, err, codes.InvalidArgument, "runtime request")
}
