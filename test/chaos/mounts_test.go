package chaos

import (
	"fmt"
	"os"
	"path/filepath"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	mountsapi "github.com/containerd/containerd/api/services/mounts/v1"
	"github.com/containerd/containerd/api/types"

	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/mounts/stack"
)

// activation has a file system made in a file, and mounted, under a lease, with which it goes.
func (r *run) activation() error {
	m, l := mountsapi.NewMountsClient(r.conn), leasesapi.NewLeasesClient(r.conn)
	lease := func() error {
		_, err := l.Create(r.ctx, &leasesapi.CreateRequest{ID: r.id})
		return err
	}
	if _, err := r.again("lease", lease, exists); err != nil {
		return err
	}
	file := filepath.Join(r.d.Dir, r.id+".disk")
	if _, err := r.again("activate", func() error {
		_, err := m.Activate(leases.With(r.ctx, r.id), &mountsapi.ActivateRequest{Name: r.id, Mounts: []*types.Mount{
			{Type: "mkfs/loop", Source: file, Options: []string{"X-containerd.mkfs.size=8MiB"}},
			{Type: "format/ext4", Source: "{{ mount 0 }}"},
			{Type: "format/bind", Source: "{{ mount 1 }}", Options: []string{"rbind"}},
		}})
		return err
	}, exists); err != nil {
		return err
	}
	info, err := m.Info(r.ctx, &mountsapi.InfoRequest{Name: r.id})
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(info.Info.System[0].Source, "lost+found")); err != nil {
		return err
	}
	if _, err := r.again("end the lease", func() error {
		_, err := l.Delete(r.ctx, &leasesapi.DeleteRequest{ID: r.id, Sync: true})
		return err
	}, missing); err != nil {
		return err
	}
	if _, err := r.again("deactivate", func() error { // the daemon may have been killed before it collected
		_, err := m.Deactivate(r.ctx, &mountsapi.DeactivateRequest{Name: r.id})
		if missing(err) {
			return nil
		}
		return err
	}, nil); err != nil {
		return err
	}
	dirs, err := stack.All(r.d.State())
	if err != nil || len(dirs) > 0 {
		return fmt.Errorf("left: %v, %v", dirs, err)
	}
	if half, err := filepath.Glob(filepath.Join(r.d.Dir, ".managerd-mkfs-*")); err != nil || len(half) > 0 {
		return fmt.Errorf("half made: %v, %v", half, err)
	}
	return os.Remove(file)
}
