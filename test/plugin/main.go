// Command plugin is a proxy plugin for tests: it serves containerd's content, snapshot and diff services from a directory of
// its own. It may be killed and started again at any moment, as any other.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/archive/remote"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
)

func main() {
	dir := flag.String("dir", "", "directory of what is stored, and of the files `applied`, with a line for each layer, and `die`, with the layer in the middle of which it dies")
	socket := flag.String("socket", "", "where to listen")
	snapshotter := flag.String("snapshotter", "outside", "name of the snapshotter")
	daemon := flag.String("daemon", "", "socket of the daemon that has the layers")
	flag.Parse()
	if err := serve(*dir, *socket, *snapshotter, *daemon); err != nil {
		fmt.Fprintln(os.Stderr, "plugin:", err)
		os.Exit(1)
	}
}

func serve(dir, socket, snapshotter, daemon string) error {
	// What is used has one namespace, whichever the daemon names.
	ctx := namespaces.With(context.Background(), flat)
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	if err != nil {
		return err
	}
	blobs, err := content.New(dir, content.Shared, db, silent{})
	if err != nil {
		return err
	}
	backend, err := native.New(filepath.Join(dir, snapshotter))
	if err != nil {
		return err
	}
	store, err := snapshots.NewStore(ctx, db, silent{}, map[string]snapshots.Backend{snapshotter: backend})
	if err != nil {
		return err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer(grpc.MaxRecvMsgSize(16<<20),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, r any, i *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if ns, ok := namespaces.From(ctx); ok && strings.Contains(i.FullMethod, ".diff.") {
				return next(namespaces.With(ctx, ns), r) // for the daemon, too
			}
			return next(namespaces.With(ctx, flat), r)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, stream{ss})
		}))
	api.NewContent(blobs).Register(s)
	api.NewSnapshots(store).Register(s)
	if daemon != "" {
		conn, err := grpc.NewClient("unix://"+daemon, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
		if err != nil {
			return err
		}
		diffapi.RegisterDiffServer(s, differ{api.NewDiff(api.NewWalking(mortal{remote.NewContent(conn), filepath.Join(dir, "die")}, diff.ApplyOptions{})), filepath.Join(dir, "applied")})
	}
	return s.Serve(l)
}

const flat = "flat"

type stream struct{ grpc.ServerStream }

func (s stream) Context() context.Context {
	return namespaces.With(s.ServerStream.Context(), flat)
}

type silent struct{}

func (silent) Publish(context.Context, string, proto.Message) error { return nil }

// mortal is content in the middle of which the program dies, when the file names it.
type mortal struct {
	remote.Content
	file string
}

func (m mortal) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	r, err := m.Content.Open(ctx, desc)
	if name, _ := os.ReadFile(m.file); err == nil && string(name) == desc.Digest.String() {
		r = &half{r, desc.Size / 2, m.file}
	}
	return r, err
}

type half struct {
	io.ReadCloser
	left int64
	file string
}

func (h *half) Read(p []byte) (int, error) {
	if h.left <= 0 {
		_ = os.Remove(h.file)
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	n, err := h.ReadCloser.Read(p[:min(int64(len(p)), h.left)])
	h.left -= int64(n)
	return n, err
}

// differ knows all layers but plain ones, and notes what it did.
type differ struct {
	diffapi.DiffServer
	file string
}

func (d differ) Apply(ctx context.Context, r *diffapi.ApplyRequest) (*diffapi.ApplyResponse, error) {
	if r.Diff.GetMediaType() == ocispec.MediaTypeImageLayer {
		return nil, status.Error(codes.Unimplemented, "plain layers are for others")
	}
	resp, err := d.DiffServer.Apply(ctx, r)
	if err == nil {
		err = d.note("apply " + r.Diff.GetDigest())
	}
	return resp, err
}

func (d differ) Diff(ctx context.Context, r *diffapi.DiffRequest) (*diffapi.DiffResponse, error) {
	resp, err := d.DiffServer.Diff(ctx, r)
	if err == nil {
		err = d.note("diff " + resp.Diff.GetDigest())
	}
	return resp, err
}

func (d differ) note(line string) error {
	f, err := os.OpenFile(d.file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, line)
	return errors.Join(err, f.Close())
}
