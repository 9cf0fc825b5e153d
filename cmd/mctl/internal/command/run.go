package command

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/spec"
)

type runFlags struct {
	detach, remove bool
	logURI         string
}

func (c *cli) runCommand() *cobra.Command {
	f := &runFlags{}
	cmd := &cobra.Command{
		Use: "run [FLAGS] IMAGE ID [COMMAND] [ARG...]", Short: "Make a container of an image and run it", Args: args(2, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error { return c.runContainer(ctx, cl, f, given) })
		},
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().BoolVarP(&f.detach, "detach", "d", false, "return as soon as the container runs")
	cmd.Flags().BoolVar(&f.remove, "rm", false, "remove the container when it has ended")
	cmd.Flags().StringVar(&f.logURI, "log-uri", "", "`URI` where output goes: file:///PATH")
	return cmd
}

func (c *cli) runContainer(ctx context.Context, cl *client.Client, f *runFlags, given []string) error {
	img, err := cl.Images.Get(ctx, &imagesapi.GetImageRequest{Name: given[0]})
	if err != nil {
		return err
	}
	t := img.Image.Target
	config, chain, err := archive.Config(ctx, cl.Blobs(), ocispec.Descriptor{MediaType: t.GetMediaType(), Digest: digest.Digest(t.GetDigest()), Size: t.GetSize()})
	if err != nil {
		return err
	}
	id := given[1]
	s, err := spec.New(id, c.namespace, spec.Image(&config.Config, given[2:]))
	if err != nil {
		return err
	}
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	root, err := cl.Snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: "overlayfs", Key: id, Parent: chain,
		Labels: map[string]string{"containerd.io/gc.root": "now"}})
	if err != nil {
		return err
	}
	_, err = cl.Containers.Create(ctx, &containersapi.CreateContainerRequest{Container: &containersapi.Container{
		ID: id, Image: given[0], Runtime: &containersapi.Container_Runtime{Name: "io.containerd.runc.v2"},
		Spec:        &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: data},
		Snapshotter: "overlayfs", SnapshotKey: id,
	}})
	if err != nil {
		return err
	}
	create := &tasksapi.CreateTaskRequest{ContainerID: id, Rootfs: root.Mounts, Stdout: f.logURI, Stderr: f.logURI}
	copied := make(chan struct{})
	close(copied)
	var keep *os.File
	if !f.detach && f.logURI == "" {
		dir, err := os.MkdirTemp("", "mctl-")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		create.Stdout = filepath.Join(dir, "stdout")
		create.Stderr = create.Stdout
		if err := unix.Mkfifo(create.Stdout, 0o600); err != nil {
			return err
		}
		in, err := os.OpenFile(create.Stdout, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer func() { _ = in.Close() }()
		if keep, err = os.OpenFile(create.Stdout, os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		defer func() { _ = keep.Close() }()
		copied = make(chan struct{})
		go func() {
			defer close(copied)
			buf := make([]byte, 32<<10)
			for {
				n, err := in.Read(buf)
				if _, werr := c.out.Write(buf[:n]); err != nil || werr != nil {
					return
				}
			}
		}()
	}
	if _, err := cl.Tasks.Create(ctx, create); err != nil {
		return err
	}
	if _, err := cl.Tasks.Start(ctx, &tasksapi.StartRequest{ContainerID: id}); err != nil {
		return err
	}
	if f.detach {
		return nil
	}
	w, err := cl.Tasks.Wait(ctx, &tasksapi.WaitRequest{ContainerID: id})
	if err != nil {
		return err
	}
	if keep != nil {
		_ = keep.Close()
	}
	if _, err := cl.Tasks.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id}); err != nil {
		return err
	}
	<-copied
	if f.remove {
		if _, err := cl.Containers.Delete(ctx, &containersapi.DeleteContainerRequest{ID: id}); err != nil {
			return err
		}
		if _, err := cl.Snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: "overlayfs", Key: id}); err != nil {
			return err
		}
	}
	if w.ExitStatus != 0 {
		return fmt.Errorf("%w", exitStatus(w.ExitStatus))
	}
	return nil
}
