package chaos

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/eventlog"
)

// content writes a blob and removes it.
func (r *run) content() error {
	c := contentapi.NewContentClient(r.conn)
	d, err := r.write(keptByLabel)
	if err == nil {
		_, err = r.again("look at content", func() error {
			_, err := c.Info(r.ctx, &contentapi.InfoRequest{Digest: d.String()})
			return err
		}, nil)
	}
	if err == nil {
		_, err = r.again("delete content", func() error {
			_, err := c.Delete(r.ctx, &contentapi.DeleteContentRequest{Digest: d.String()})
			return err
		}, missing)
	}
	return err
}

// garbage writes a blob that nothing keeps, and has it collected.
func (r *run) garbage() error {
	if _, err := r.write(nil); err != nil {
		return err
	}
	c := leasesapi.NewLeasesClient(r.conn)
	_, err := r.again("lease", func() error {
		_, err := c.Create(r.ctx, &leasesapi.CreateRequest{ID: r.id})
		return err
	}, exists)
	if err == nil {
		_, err = r.again("collect", func() error {
			_, err := c.Delete(r.ctx, &leasesapi.DeleteRequest{ID: r.id, Sync: true})
			return err
		}, missing)
	}
	for err == nil && r.stored() != nil { // a daemon that was killed while it collected is followed by one that does
		select {
		case <-time.After(20 * time.Millisecond):
		case <-r.ctx.Done():
			return r.stored()
		}
	}
	return err
}

// roll fills the log of events until it has dropped a segment.
func (r *run) roll() error {
	const size = 1 << 19
	c := eventsapi.NewEventsClient(r.conn)
	body := &anypb.Any{TypeUrl: "chaos", Value: make([]byte, size)}
	for range (eventlog.Default.Total + 2*eventlog.Default.Segment) / size {
		_, err := r.again("publish", func() error {
			_, err := c.Publish(r.ctx, &eventsapi.PublishRequest{Topic: "/chaos/filling", Event: body})
			return err
		}, nil)
		if err != nil {
			return err
		}
	}
	return nil
}

// write makes a blob.
func (r *run) write(labels map[string]string) (digest.Digest, error) {
	c := contentapi.NewContentClient(r.conn)
	data := []byte("of " + r.id)
	d := digest.FromBytes(data)
	try := 0
	_, err := r.again("write content", func() error {
		try++
		stream, err := c.Write(r.ctx)
		if err != nil {
			return err
		}
		err = stream.Send(&contentapi.WriteContentRequest{
			Action: contentapi.WriteAction_COMMIT, Ref: fmt.Sprint(r.id, "-", try), Total: int64(len(data)), Expected: d.String(), Data: data,
			Labels: labels,
		})
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		_, err = stream.Recv()
		return err
	}, exists)
	r.want["/content/create "+d.String()+" "]++
	r.want["/content/delete "+d.String()+" "]++
	return d, err
}

// snapshot prepares one, commits it and removes it.
func (r *run) snapshot() error {
	key, name := r.id+"-key", r.id+"-name"
	_, err := r.again("prepare", func() error {
		_, err := r.snapshots.Prepare(r.ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: key, Parent: r.parent, Labels: keptByLabel})
		return err
	}, exists)
	if err == nil {
		_, err = r.again("commit", func() error {
			_, err := r.snapshots.Commit(r.ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: snapshotter, Key: key, Name: name, Labels: keptByLabel})
			return err
		}, func(err error) bool { return exists(err) || missing(err) })
	}
	if err == nil {
		_, err = r.again("remove", func() error {
			_, err := r.snapshots.Remove(r.ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: name})
			return err
		}, missing)
	}
	r.want["/snapshot/prepare "+key+" "]++
	r.want["/snapshot/commit "+key+" "]++
	r.want["/snapshot/remove "+name+" "]++
	return err
}

// stored says whether there is storage that no record names. A snapshot's goes behind the answer to its removal.
func (r *run) stored() error {
	var errs []error
	known := 0
	if err := r.eachSnapshot(func(*snapshotsapi.Info) { known++ }); err != nil {
		return err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		dirs, err := os.ReadDir(filepath.Join(r.d.Root(), "io.containerd.snapshotter.v1.overlayfs", "snapshots"))
		if err == nil && len(dirs) == known {
			break
		}
		if err != nil || time.Now().After(deadline) {
			errs = append(errs, fmt.Errorf("%d snapshots have %d directories: %v", known, len(dirs), err))
			break
		}
	}
	d := digest.FromBytes([]byte("of " + r.id))
	if _, err := os.Stat(filepath.Join(r.d.Root(), "io.containerd.content.v1.content", "blobs", d.Algorithm().String(), d.Encoded())); !os.IsNotExist(err) {
		errs = append(errs, fmt.Errorf("the blob is there though it is deleted: %v", err))
	}
	return errors.Join(errs...)
}
