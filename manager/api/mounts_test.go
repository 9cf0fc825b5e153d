package api

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	mountsapi "github.com/containerd/containerd/api/services/mounts/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts"
	"github.com/managerd/managerd/manager/namespaces"
)

// TestMounts: the service Mounts over the wire.
func TestMounts(t *testing.T) {
	dir := t.TempDir()
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	store, err := mounts.New(dir, db, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	NewMounts(store).Register(srv)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		<-done
	})
	c := mountsapi.NewMountsClient(conn)
	ctx := namespaces.With(context.Background(), "one")
	bind := &types.Mount{Type: "bind", Source: dir, Options: []string{"bind", "ro"}}
	if _, err := c.Activate(ctx, &mountsapi.ActivateRequest{Name: "x", Mounts: []*types.Mount{bind}}); status.Code(err) != codes.Unimplemented {
		t.Errorf("what a client can mount by itself: %v", err)
	}
	r, err := c.Activate(ctx, &mountsapi.ActivateRequest{Name: "x", Labels: map[string]string{"k": "v"}, Mounts: []*types.Mount{
		bind, {Type: "format/bind", Source: "{{ mount 0 }}", Options: []string{"bind", "ro"}},
	}})
	if err != nil || len(r.Info.Active) != 1 || r.Info.Active[0].MountedAt.AsTime().IsZero() || r.Info.System[0].Source != r.Info.Active[0].MountPoint {
		t.Fatalf("%v, %v", r, err)
	}
	u, err := c.Update(ctx, &mountsapi.UpdateRequest{Info: &types.ActivationInfo{Name: "x", Labels: map[string]string{"k": "w"}}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels.k"}}})
	if err != nil || u.Info.Labels["k"] != "w" {
		t.Errorf("%v, %v", u, err)
	}
	if i, err := c.Info(ctx, &mountsapi.InfoRequest{Name: "x"}); err != nil || i.Info.Labels["k"] != "w" {
		t.Errorf("%v, %v", i, err)
	}
	list, err := c.List(ctx, &mountsapi.ListRequest{Filters: []string{"labels.k==w"}})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := list.Recv(); err != nil || m.Info.Name != "x" {
		t.Errorf("%v, %v", m, err)
	}
	if _, err := list.Recv(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if _, err := c.Deactivate(ctx, &mountsapi.DeactivateRequest{Name: "x"}); err != nil {
		t.Fatal(err)
	}
	// Temporary, under a lease, with a loop device.
	if _, err := leases.NewStore(db).Create(ctx, "l", nil); err != nil {
		t.Fatal(err)
	}
	r, err = c.Activate(leases.With(ctx, "l"), &mountsapi.ActivateRequest{Name: "t", Temporary: true, Mounts: []*types.Mount{
		{Type: "mkfs/loop", Source: filepath.Join(dir, "disk"), Options: []string{"X-containerd.mkfs.size=8MiB"}},
		{Type: "format/ext4", Source: "{{ mount 0 }}"},
	}})
	if err != nil || len(r.Info.Active) != 2 || len(r.Info.System) != 1 || r.Info.System[0].Type != "bind" || r.Info.System[0].Source != r.Info.Active[1].MountPoint {
		t.Fatalf("%v, %v", r, err)
	}
	if held, err := leases.NewStore(db).ListResources(ctx, "l"); err != nil || len(held) != 1 || held[0] != (leases.Resource{Type: "mounts", ID: "t"}) {
		t.Errorf("%v, %v", held, err)
	}
	if link, err := os.Readlink(r.Info.Active[0].MountPoint); err != nil || link != r.Info.Active[0].Data["device"] {
		t.Errorf("%v, %v", link, err)
	}
	inUse, err := os.Open(r.Info.Active[1].MountPoint)
	if err != nil {
		t.Fatal(err)
	}
	busy := second(c.Deactivate(ctx, &mountsapi.DeactivateRequest{Name: "t"}))
	if err := errors.Join(inUse.Close(), second(c.Deactivate(ctx, &mountsapi.DeactivateRequest{Name: "t"}))); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"FailedPrecondition": busy,
		"NotFound":           second(c.Info(ctx, &mountsapi.InfoRequest{Name: "x"})),
		"InvalidArgument":    second(c.Update(ctx, &mountsapi.UpdateRequest{})),
	} {
		if status.Code(err).String() != name {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }
