package shimfake

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/shimapi"
)

// CheckpointFile is what a fake's checkpoint consists of, named as one of criu's files. It has the id of the container.
const CheckpointFile = "inventory.img"

// checkpoint writes the file, and ends the process if the options say so.
func (s *Shim) checkpoint(_ context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findLocked(r.ID, "", shimapi.ReqCheckpoint)
	if err != nil {
		return nil, err
	}
	opts := &options.CheckpointOptions{}
	if r.Options.GetTypeUrl() != "" {
		if err := typeurl.UnmarshalTo(r.Options, opts); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(r.Path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("cannot checkpoint container %s: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
	}
	if err := os.WriteFile(filepath.Join(r.Path, CheckpointFile), []byte(r.ID), 0o600); err != nil {
		return nil, err
	}
	if err := s.emit("/tasks/checkpointed", &events.TaskCheckpointed{ContainerID: r.ID}); err != nil {
		return nil, err
	}
	if opts.Exit {
		return empty, s.exitLocked(p, 128+9)
	}
	return empty, nil
}

// createFrom makes a container without a process.
func (s *Shim) createFrom(p *process, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	if _, err := os.Stat(filepath.Join(r.Checkpoint, CheckpointFile)); err != nil {
		return nil, fmt.Errorf("cannot restore container %s: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
	}
	p.images = r.Checkpoint
	s.init = p
	return &task.CreateTaskResponse{}, s.emit("/tasks/create", &events.TaskCreate{ContainerID: r.ID, Bundle: r.Bundle, Checkpoint: r.Checkpoint})
}

// restore gives it one; the checkpoint must still be there.
func (s *Shim) restore(p *process) error {
	if _, err := os.Stat(filepath.Join(p.images, CheckpointFile)); err != nil {
		return fmt.Errorf("cannot restore container %s: %w", s.cfg.ID, err)
	}
	p.images = ""
	return s.record(p)
}
