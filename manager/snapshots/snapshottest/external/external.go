// Package external is a snapshotter that is another process, for tests of proxy plugins: the native one behind containerd's
// API, in a store of its own that knows nothing of namespaces.
package external

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
)

// Stored begins the targets that it has without being given their content, as snapshotters do that fetch it when it is
// read. Such a snapshot has a file "fetched".
const Stored = "stored-"

// Socket is where it listens.
func Socket(dir string) string { return filepath.Join(dir, "socket") }

// Start starts this test's binary again, to run the test that calls Serve, with env set to dir, and waits until it listens.
// It is killed at the end of the test, or by stop.
func Start(t *testing.T, test, env, dir string) (pid int, stop func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run", test, "-test.timeout", "0")
	cmd.Env = append(os.Environ(), env+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	t.Cleanup(stop)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", Socket(dir))
		if err == nil {
			_ = c.Close()
			return cmd.Process.Pid, stop
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// Serve is that process; name is what the snapshotter is called. It returns an error.
func Serve(dir, name string) error {
	ctx := namespaces.With(context.Background(), "flat")
	db, err := metadata.Open(filepath.Join(dir, "outside.db"))
	if err != nil {
		return err
	}
	b, err := native.New(filepath.Join(dir, "outside"))
	if err != nil {
		return err
	}
	store, err := snapshots.NewStore(ctx, db, silent{}, map[string]snapshots.Backend{name: b})
	if err != nil {
		return err
	}
	if err := os.Remove(Socket(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", Socket(dir))
	if err != nil {
		return err
	}
	s := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(namespaces.With(ctx, "flat"), r)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, flat{ss})
		}))
	snapshotsapi.RegisterSnapshotsServer(s, lazy{api.NewSnapshots(store)})
	return s.Serve(l)
}

type silent struct{}

func (silent) Publish(context.Context, string, proto.Message) error { return nil }

type flat struct{ grpc.ServerStream }

func (f flat) Context() context.Context { return namespaces.With(f.ServerStream.Context(), "flat") }

// lazy has some targets by itself.
type lazy struct{ snapshotsapi.SnapshotsServer }

func (l lazy) Prepare(ctx context.Context, q *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	target := q.Labels[snapshots.LabelRef]
	delete(q.Labels, snapshots.LabelRef)
	resp, err := l.SnapshotsServer.Prepare(ctx, q)
	if err != nil || !strings.Contains(target, "/"+Stored) {
		return resp, err
	}
	if err := os.WriteFile(filepath.Join(resp.Mounts[0].Source, "fetched"), nil, 0o644); err != nil {
		return nil, err
	}
	if _, err := l.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: q.Snapshotter, Name: target, Key: q.Key, Labels: q.Labels}); err != nil {
		return nil, err
	}
	q.Key, q.Parent = target, ""
	return l.SnapshotsServer.Prepare(ctx, q) // AlreadyExists
}
