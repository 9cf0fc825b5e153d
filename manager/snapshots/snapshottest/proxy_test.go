package snapshottest_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/proxy"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/manager/snapshots/snapshottest/external"
)

const (
	serveEnv = "SNAPSHOTTEST_SERVE" // the directory that this process is to be a snapshotter in
	outside  = "outside"            // what it is called
	stored   = external.Stored
)

// foreign is a snapshotter that is another process: native behind containerd's API.
var foreign = snapshottest.Column{
	Name: "proxy", Stored: ours, Foreign: true,
	Open:  func(root string) (snapshots.Backend, error) { return connect(filepath.Dir(root), 0) },
	Setup: func(t *testing.T) string { dir := t.TempDir(); serve(t, dir); return dir },
}

func connect(dir string, quick time.Duration) (snapshots.Backend, error) {
	return proxy.New(proxy.Options{Name: outside, Address: external.Socket(dir), Owner: "tests", Quick: quick})
}

// ours lists the IDs of what the other process stores for us.
func ours(root string) (ids []string, err error) {
	conn, err := grpc.NewClient("unix://"+external.Socket(filepath.Dir(root)), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	stream, err := snapshotsapi.NewSnapshotsClient(conn).List(context.Background(), &snapshotsapi.ListSnapshotsRequest{Snapshotter: outside})
	if err != nil {
		return nil, err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			slices.Sort(ids)
			if strings.Contains(err.Error(), "EOF") {
				err = nil
			}
			return ids, err
		}
		for _, i := range r.Info {
			if i.Labels[proxy.LabelOwner] == "tests" {
				ids = append(ids, strings.Split(i.Name, "/")[1])
			}
		}
	}
}

// serve starts the process in dir; it is killed at the end of the test, or by stop.
func serve(t *testing.T, dir string) (pid int, stop func()) {
	t.Helper()
	return external.Start(t, "^TestServe$", serveEnv, dir)
}

// TestServe is that process.
func TestServe(t *testing.T) {
	dir := os.Getenv(serveEnv)
	if dir == "" {
		t.Skip("this is a part of other tests")
	}
	t.Fatal(external.Serve(dir, outside))
}

// TestProxyStored: what the other program has by itself is recorded as committed, and used like any other.
func TestProxyStored(t *testing.T) {
	dir := foreign.Dir(t)
	e, stop := snapshottest.Open(t, dir, foreign.Open)
	for _, name := range []string{"a", "b"} {
		parent := map[string]string{"b": stored + "a"}[name]
		labels := map[string]string{snapshots.LabelRef: stored + name, "containerd.io/snapshot/x": "y", "other": "z"}
		for range 2 { // made, and found
			_, err := e.S.Prepare(e.Ctx, "k", parent, labels)
			e.Is(err, errdefs.ErrAlreadyExists)
			i, err := e.S.Stat(e.Ctx, stored+name)
			e.Must(err)
			if i.Kind != snapshots.Committed || i.Parent != parent || i.Labels["other"] != "z" {
				t.Errorf("%+v", i)
			}
		}
		_, err := e.S.Stat(e.Ctx, "k")
		e.Is(err, errdefs.ErrNotFound)
	}
	m, err := e.S.Prepare(e.Ctx, "k", stored+"b", nil)
	e.Must(err)
	e.On(m, func(root string) {
		if _, err := os.Stat(filepath.Join(root, "fetched")); err != nil {
			t.Error(err)
		}
	})
	stop()
	e, _ = snapshottest.Open(t, dir, foreign.Open)
	e.Must(e.S.Cleanup(e.Ctx))
	for _, name := range []string{"k", stored + "b", stored + "a"} {
		e.Must(e.S.Remove(e.Ctx, name))
	}
	e.Must(e.S.Cleanup(e.Ctx))
	if left, err := ours(e.Root); err != nil || len(left) > 0 {
		t.Errorf("stored: %v, %v", left, err)
	}
}

// TestProxyOthers: what another daemon stores in the same program is left alone.
func TestProxyOthers(t *testing.T) {
	dir := foreign.Dir(t)
	e, _ := snapshottest.Open(t, dir, foreign.Open)
	other, err := proxy.New(proxy.Options{Name: outside, Address: external.Socket(dir), Owner: "another"})
	e.Must(err)
	defer func() { e.Must(other.Close()) }()
	s := snapshots.Snapshot{Ref: snapshots.Ref{ID: 5, Namespace: "one", Key: "theirs"}, Kind: snapshots.Active}
	e.Must(other.Create(e.Ctx, s))
	e.Must(e.S.Cleanup(e.Ctx))
	_, err = other.Mounts(e.Ctx, s)
	e.Must(err)
	// What is left of ours, of which there is no record, goes even with a child.
	b, err := connect(dir, 0)
	e.Must(err)
	defer func() { e.Must(b.Close()) }()
	lost := snapshots.Snapshot{Ref: snapshots.Ref{ID: 70, Namespace: "one", Key: "lost"}, Kind: snapshots.Active}
	e.Must(b.Create(e.Ctx, lost))
	to := snapshots.Ref{ID: 70, Namespace: "one", Key: "base"}
	_, err = b.Commit(e.Ctx, lost, to)
	e.Must(err)
	e.Must(b.Create(e.Ctx, snapshots.Snapshot{Ref: snapshots.Ref{ID: 71, Namespace: "one", Key: "child"}, Kind: snapshots.Active, Parents: []snapshots.Ref{to}}))
	e.Must(b.Sweep(e.Ctx, func(uint64) bool { return false }))
	if left, err := ours(e.Root); err != nil || len(left) > 0 {
		t.Errorf("stored: %v, %v", left, err)
	}
	_, err = other.Mounts(e.Ctx, s)
	e.Must(err)
}

// TestProxyKilled: while the other program is away calls say so, at once; when it is back they work, without anybody's doing.
func TestProxyKilled(t *testing.T) {
	dir := t.TempDir()
	_, kill := serve(t, dir)
	e, _ := snapshottest.Open(t, dir, foreign.Open)
	m, err := e.S.Prepare(e.Ctx, "k", "", nil)
	e.Must(err)
	for range 3 {
		kill()
		if _, err := e.S.Mounts(e.Ctx, "k"); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), outside) {
			t.Errorf("away: %v", err)
		}
		_, kill = serve(t, dir)
		again, err := e.S.Mounts(e.Ctx, "k")
		e.Must(err)
		if !slices.EqualFunc(m, again, func(a, b *types.Mount) bool { return proto.Equal(a, b) }) {
			t.Errorf("%v, before %v", again, m)
		}
	}
}

// TestProxyHangs: a program that does not answer costs whoever asks it the deadline, and nobody else anything: other
// snapshotters, the start, the end.
func TestProxyHangs(t *testing.T) {
	dir := t.TempDir()
	pid, _ := serve(t, dir)
	quick := func(root string) (snapshots.Backend, error) { return connect(filepath.Dir(root), 200*time.Millisecond) }
	e, stop := snapshottest.Open(t, dir, quick)
	_, err := e.S.Prepare(e.Ctx, "k", "", nil)
	e.Must(err)
	stop()
	e.Must(syscall.Kill(pid, syscall.SIGSTOP))
	resume := sync.OnceFunc(func() { e.Must(syscall.Kill(pid, syscall.SIGCONT)) })
	defer resume()

	within := time.Now().Add(30 * time.Second) // the patience with what lists is ten minutes
	e, stop = snapshottest.Open(t, dir, quick)
	b, err := native.New(filepath.Join(dir, "native"))
	e.Must(err)
	e.Must(e.Store.Add(e.Ctx, native.Name, b))
	_, err = e.S.Mounts(e.Ctx, "k")
	e.Is(err, errdefs.ErrUnavailable)
	_, err = e.S.Mounts(e.Ctx, "k") // it is not asked again at once
	e.Is(err, errdefs.ErrUnavailable)
	if err == nil || !strings.Contains(err.Error(), "has not answered since") {
		t.Errorf("error: %v", err)
	}
	_, err = e.S.Stat(e.Ctx, "k")
	e.Must(err)
	other, err := e.Store.Snapshotter(native.Name)
	e.Must(err)
	_, err = other.Prepare(e.Ctx, "k", "", nil)
	e.Must(err)
	e.Must(e.S.Remove(e.Ctx, "k"))
	stop()
	if time.Now().After(within) {
		t.Error("something waited for the other program")
	}

	resume()
	e, _ = snapshottest.Open(t, dir, quick)
	e.Must(e.S.Cleanup(e.Ctx))
	if left, err := ours(e.Root); err != nil || len(left) > 0 {
		t.Errorf("stored: %v, %v", left, err)
	}
}
