package api_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/archive/local"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
	"github.com/managerd/managerd/shimapi/mount"
)

// layerServer serves snapshots, diffs and content over a real socket.
func layerServer(t *testing.T) (context.Context, *grpc.ClientConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "api-") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	must(err)
	t.Cleanup(func() { _ = db.Close() })
	ctx := namespaces.With(context.Background(), "one")
	x := events.NewExchange()
	overlay, err := overlayfs.New(filepath.Join(dir, "overlay"), overlayfs.Options{})
	must(err)
	nat, err := native.New(filepath.Join(dir, "native"))
	must(err)
	store, err := snapshots.NewStore(ctx, db, x, map[string]snapshots.Backend{overlayfs.Name: overlay, native.Name: nat})
	must(err)
	t.Cleanup(func() { _ = store.Close() })
	blobs, err := content.New(dir, content.Shared, db, x)
	must(err)
	srv := grpc.NewServer()
	api.NewSnapshots(store).Register(srv)
	api.NewDiff(api.NewWalking(local.NewContent(blobs), diff.ApplyOptions{Processors: decoders})).Register(srv)
	api.NewContent(blobs).Register(srv)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	must(err)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(err)
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		<-done
	})
	return ctx, conn
}

func wantCode(t *testing.T, err error, want codes.Code, words string) {
	t.Helper()
	if status.Code(err) != want || err != nil && !strings.Contains(err.Error(), words) {
		t.Errorf("error is %v, want %s with %q", err, want, words)
	}
}

func TestSnapshotService(t *testing.T) {
	ctx, conn := layerServer(t)
	c := snapshotsapi.NewSnapshotsClient(conn)
	for _, sn := range []string{overlayfs.Name, native.Name} {
		prepare := func(key, parent string) error {
			_, err := c.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: sn, Key: key, Parent: parent, Labels: map[string]string{"a": "1"}})
			return err
		}
		wantCode(t, prepare("k", ""), codes.OK, "")
		wantCode(t, prepare("k", ""), codes.AlreadyExists, `"k"`)
		wantCode(t, prepare("l", "missing"), codes.NotFound, `"missing"`)
		wantCode(t, prepare("l", "k"), codes.InvalidArgument, "not committed")
		wantCode(t, prepare("", ""), codes.InvalidArgument, "key")
		_, err := c.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: sn, Key: "k", Name: "n", Parent: "elsewhere"})
		wantCode(t, err, codes.Unimplemented, "elsewhere")
		_, err = c.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: sn, Key: "k", Name: "n", Labels: map[string]string{"b": "2"}})
		wantCode(t, err, codes.OK, "")
		_, err = c.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: sn, Key: "n"})
		wantCode(t, err, codes.FailedPrecondition, "committed")
		v, err := c.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: sn, Key: "v", Parent: "n"})
		wantCode(t, err, codes.OK, "")
		m, err := c.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: sn, Key: "v"})
		if err != nil || len(m.Mounts) != 1 || m.Mounts[0].String() != v.Mounts[0].String() {
			t.Errorf("%v, %v", m, err)
		}
		_, err = c.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: sn, Key: "n"})
		wantCode(t, err, codes.FailedPrecondition, `"v"`)
		s, err := c.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: sn, Key: "n"})
		if err != nil || s.Info.Kind != snapshotsapi.Kind_COMMITTED || s.Info.Labels["b"] != "2" || !s.Info.CreatedAt.IsValid() {
			t.Errorf("%v, %v", s, err)
		}
		u, err := c.Update(ctx, &snapshotsapi.UpdateSnapshotRequest{
			Snapshotter: sn, Info: &snapshotsapi.Info{Name: "n", Labels: map[string]string{"c": "3"}},
			UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels.c"}},
		})
		if err != nil || u.Info.Labels["b"] != "2" || u.Info.Labels["c"] != "3" {
			t.Errorf("%v, %v", u, err)
		}
		_, err = c.Update(ctx, &snapshotsapi.UpdateSnapshotRequest{
			Snapshotter: sn, Info: &snapshotsapi.Info{Name: "n"}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"kind"}},
		})
		wantCode(t, err, codes.InvalidArgument, `"kind"`)
		if usage, err := c.Usage(ctx, &snapshotsapi.UsageRequest{Snapshotter: sn, Key: "n"}); err != nil || usage.Inodes < 1 {
			t.Errorf("%v, %v", usage, err)
		}
		if got := listSnapshots(t, ctx, c, sn, "kind==view"); !slices.Equal(got, []string{"v"}) {
			t.Errorf("views: %v", got)
		}
		if got := listSnapshots(t, namespaces.With(ctx, "two"), c, sn); len(got) != 0 {
			t.Errorf("another namespace has %v", got)
		}
		stream, err := c.List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: sn, Filters: []string{"==="}})
		if err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, err, codes.InvalidArgument, "")
		_, err = c.Cleanup(ctx, &snapshotsapi.CleanupRequest{Snapshotter: sn})
		wantCode(t, err, codes.OK, "")
		for _, k := range []string{"v", "n"} {
			_, err = c.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: sn, Key: k})
			wantCode(t, err, codes.OK, "")
		}
		_, err = c.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: sn, Key: "n"})
		wantCode(t, err, codes.NotFound, `"n"`)
		_, err = c.Stat(context.Background(), &snapshotsapi.StatSnapshotRequest{Snapshotter: sn, Key: "n"})
		wantCode(t, err, codes.FailedPrecondition, "namespace")
	}
	for _, sn := range []string{"", "missing"} {
		_, err := c.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: sn, Key: "n"})
		wantCode(t, err, codes.InvalidArgument, "")
	}
}

func listSnapshots(t *testing.T, ctx context.Context, c snapshotsapi.SnapshotsClient, sn string, filters ...string) (out []string) {
	t.Helper()
	s, err := c.List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: sn, Filters: filters})
	if err != nil {
		t.Fatal(err)
	}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range r.Info {
			out = append(out, i.Name)
		}
	}
}

// putBlob writes content over gRPC.
func putBlob(t *testing.T, ctx context.Context, conn *grpc.ClientConn, data []byte) *types.Descriptor {
	t.Helper()
	s, err := contentapi.NewContentClient(conn).Write(ctx)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	if err := s.Send(&contentapi.WriteContentRequest{
		Action: contentapi.WriteAction_COMMIT, Ref: d.String(), Data: data, Total: int64(len(data)), Expected: d.String(),
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	return &types.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d.String(), Size: int64(len(data))}
}

// layerTar is a layer with one file.
func layerTar(t *testing.T, name string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: 4}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "body"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestDiffService(t *testing.T) {
	ctx, conn := layerServer(t)
	s, d := snapshotsapi.NewSnapshotsClient(conn), diffapi.NewDiffClient(conn)
	layer := func(name string) []byte { return layerTar(t, name) }
	for _, sn := range []string{overlayfs.Name, native.Name} {
		a, err := s.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: sn, Key: "a"})
		if err != nil {
			t.Fatal(err)
		}
		blob := putBlob(t, ctx, conn, layer("first-"+sn))
		r, err := d.Apply(ctx, &diffapi.ApplyRequest{Diff: blob, Mounts: a.Mounts, SyncFs: true})
		if err != nil || r.Applied.Digest != blob.Digest || r.Applied.Size != blob.Size {
			t.Fatalf("%v, %v", r, err)
		}
		if _, err := s.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: sn, Key: "a", Name: "A"}); err != nil {
			t.Fatal(err)
		}
		b, err := s.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: sn, Key: "b", Parent: "A"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Apply(ctx, &diffapi.ApplyRequest{Diff: putBlob(t, ctx, conn, layer("second-"+sn)), Mounts: b.Mounts}); err != nil {
			t.Fatal(err)
		}
		v, err := s.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: sn, Key: "v", Parent: "A"})
		if err != nil {
			t.Fatal(err)
		}
		made, err := d.Diff(ctx, &diffapi.DiffRequest{Left: v.Mounts, Right: b.Mounts, Labels: map[string]string{"l": "1"}, Ref: "r"})
		if err != nil {
			t.Fatal(err)
		}
		info, err := contentapi.NewContentClient(conn).Info(ctx, &contentapi.InfoRequest{Digest: made.Diff.Digest})
		if err != nil || made.Diff.MediaType != ocispec.MediaTypeImageLayerGzip || info.Info.Size != made.Diff.Size || info.Info.Labels["l"] != "1" || info.Info.Labels["containerd.io/uncompressed"] == "" {
			t.Errorf("%v, %v, %v", made, info, err)
		}
		// The layer that was made makes the same of the parent.
		again, err := s.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: sn, Key: "again", Parent: "A"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Apply(ctx, &diffapi.ApplyRequest{Diff: made.Diff, Mounts: again.Mounts}); err != nil {
			t.Fatal(err)
		}
		if err := mount.WithTemp(again.Mounts, func(root string) error {
			for _, f := range []string{"first-", "second-"} {
				if body, err := os.ReadFile(filepath.Join(root, f+sn)); err != nil || string(body) != "body" {
					t.Errorf("%q, %v", body, err)
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}

		_, err = d.Apply(ctx, &diffapi.ApplyRequest{Diff: blob, Mounts: v.Mounts})
		wantCode(t, err, codes.FailedPrecondition, "read-only")
		_, err = d.Apply(ctx, &diffapi.ApplyRequest{Diff: putBlob(t, ctx, conn, layer("../out-"+sn)), Mounts: b.Mounts})
		wantCode(t, err, codes.InvalidArgument, "leaves the root")
		_, err = d.Apply(ctx, &diffapi.ApplyRequest{Diff: putBlob(t, ctx, conn, layer("short-" + sn)[:300]), Mounts: b.Mounts})
		wantCode(t, err, codes.InvalidArgument, "cut short")
		_, err = d.Apply(ctx, &diffapi.ApplyRequest{
			Diff: &types.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("missing").String()}, Mounts: b.Mounts,
		})
		wantCode(t, err, codes.NotFound, digest.FromString("missing").String())
		_, err = d.Apply(namespaces.With(ctx, "two"), &diffapi.ApplyRequest{Diff: blob, Mounts: b.Mounts})
		wantCode(t, err, codes.NotFound, blob.Digest)
		_, err = d.Apply(context.Background(), &diffapi.ApplyRequest{Diff: blob, Mounts: b.Mounts})
		wantCode(t, err, codes.FailedPrecondition, "namespace")
		_, err = d.Diff(ctx, &diffapi.DiffRequest{Left: v.Mounts, Right: b.Mounts, MediaType: "text/plain"})
		wantCode(t, err, codes.Unimplemented, "text/plain")
	}
}
