package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/fsck"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/orphans"
	"github.com/managerd/managerd/manager/shims"
)

// MetadataFile is the database, below the root directory.
const MetadataFile = "metadata.db"

// metadataHealth is the service of the health protocol that is not serving as long as a recovery is not acknowledged.
const metadataHealth = "metadata"

// openDatabase opens the database, whatever has become of it. What it does not know any more is made again by those whose
// it is: snapshotters when they are opened, containers with the tasks, content behind the start.
func (s *Server) openDatabase() (err error) {
	path, used := filepath.Join(s.cfg.Root, MetadataFile), false
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		used = s.used()
	}
	if s.db, err = metadata.OpenAnyway(path, used, s.log); err != nil {
		return err
	}
	s.closers = append(s.closers, s.db.Close)
	if err := s.db.Deliver(s.exchange.ForwardFrom); err != nil {
		return err
	}
	s.tellHealth()
	if w := s.recoveryWarning(); w != "" {
		s.log.Warn(w)
	}
	return nil
}

// used says whether the directories have been those of a managerd before.
func (s *Server) used() bool {
	for _, pattern := range []string{
		filepath.Join(s.cfg.Root, content.Dir, "blobs", "*", "*"),
		filepath.Join(s.cfg.Root, "io.containerd.snapshotter.v1.*", "snapshots", "*"),
		filepath.Join(s.cfg.State, bundle.Dir, "*", "*"),
	} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 { // the patterns are right
			return true
		}
	}
	return false
}

// recoveryWarning says in one line what has become of the database; empty when there is nothing to say.
func (s *Server) recoveryWarning() string {
	if s.db == nil {
		return ""
	}
	r, err := s.db.Recovery()
	if err != nil {
		return fmt.Sprintf("whether the database was recovered cannot be read: %v", err)
	}
	if r == nil {
		return ""
	}
	said := map[string]string{
		metadata.Damaged: "the database was damaged, and what could be read of it salvaged",
		metadata.Missing: "there was no database",
		metadata.Older:   "the database is a copy from before",
	}[r.Reason]
	if r.Aside != "" {
		said += "; the damaged one is " + r.Aside
	}
	return said + "; nothing that it does not know is removed until `mctl fsck --fix` ends this"
}

// tellHealth tells those who ask for the health of the database.
func (s *Server) tellHealth() {
	status := healthapi.HealthCheckResponse_SERVING
	if s.recoveryWarning() != "" {
		status = healthapi.HealthCheckResponse_NOT_SERVING
	}
	s.health.SetServingStatus(metadataHealth, status)
}

// restoreContainers enters the containers of all tasks that the database does not know.
func (s *Server) restoreContainers(bundles *bundle.Store) error {
	on, err := s.db.Recovering(metadata.PartContainers)
	if err != nil || !on {
		return err
	}
	found, err := bundles.List()
	if err != nil {
		return err
	}
	var all []containers.Remains
	var notes []string
	for _, b := range found {
		note, spec, err := b.Record()
		if err != nil {
			notes = append(notes, fmt.Sprintf("the container of task %s in namespace %s cannot be made again: %v", b.ID, b.Namespace, err))
			continue
		}
		runtime := shims.DefaultRuntime
		if binary, _, err := b.Shim(); err == nil && binary != "" && filepath.Base(binary) != shims.BinaryName {
			runtime = binary
		}
		all = append(all, containers.Remains{Namespace: b.Namespace, ID: b.ID, Note: note, Spec: spec, Runtime: runtime})
	}
	made, bad, err := containers.Restore(s.db, all)
	if err != nil {
		return err
	}
	for _, err := range bad {
		notes = append(notes, err.Error())
	}
	if made > 0 {
		notes = append(notes, fmt.Sprintf("%d containers were made again from the bundles of their tasks", made))
	}
	if len(notes) > 0 {
		s.log.Warn("recovery of containers", "what", strings.Join(notes, "; "))
	}
	return s.db.Recovered(metadata.PartContainers, notes...)
}

// restoring is how long to wait before another program that keeps content is asked again.
const restoring = 10 * time.Second

// restoreContent makes the records of content again while the daemon serves: it may have to read all of it. Then what a
// program that keeps content has of ours in vain is removed, which waits until that program is there.
func (s *Server) restoreContent(ctx context.Context) {
	if s.content == nil {
		return
	}
	s.watching.Go(func() {
		for {
			err := s.content.Restore(ctx)
			if err == nil {
				err = s.content.Tidy(ctx)
			}
			if err == nil || ctx.Err() != nil {
				return
			}
			if !errdefs.IsUnavailable(err) {
				s.log.Error("the next start tries again", "error", err)
				return
			}
			s.log.Debug("content is not cleared up yet", "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(restoring):
			}
		}
	})
}

// recoveryParts are those that must be done before a recovery can be ended.
func (s *Server) recoveryParts() (parts []string) {
	if s.content != nil {
		parts = append(parts, metadata.PartContent)
	}
	if s.tasks != nil {
		parts = append(parts, metadata.PartContainers)
	}
	return parts
}

// checker looks at what the parts that work have.
func (s *Server) checker(p *parts) *fsck.Checker {
	c := &fsck.Checker{
		State: s.cfg.State, Root: s.cfg.Root, DB: s.db, Content: p.content, Snapshots: p.snapshots, Events: p.eventLog,
		Parts: s.recoveryParts, Acknowledged: s.tellHealth, SnapshotRoot: s.cfg.SnapshotterRoot,
	}
	if s.tasks != nil {
		c.Tasks = func() (all []orphans.Task) {
			for _, t := range s.tasks.All() {
				all = append(all, orphans.Task{Namespace: t[0], ID: t[1]})
			}
			return all
		}
	}
	c.Sandboxes = func() (all []orphans.Task, has bool) {
		if s.sandboxes == nil { // not yet, or it does not work
			return nil, false
		}
		for _, b := range s.sandboxes.All() {
			all = append(all, orphans.Task{Namespace: b[0], ID: b[1], Sandbox: true})
		}
		return all, true
	}
	return c
}
