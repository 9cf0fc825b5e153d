package mounts

import (
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
)

// TestContainer: mounts of a task take the place of those of an earlier one, and are not mistaken for a client's of that name.
func TestContainer(t *testing.T) {
	s, ctx, dir := fresh(t)
	for _, file := range []string{"one", "two"} {
		left, err := s.ActivateFor(ctx, "c", disk(filepath.Join(dir, file)))
		if err != nil || len(left) != 1 || left[0].Type != "bind" {
			t.Fatalf("%v, %v", left, err)
		}
		if a, err := s.Info(ctx, "c"); err != nil || a.Labels[backLabel] != "c" || a.Active[0].Mount.Source != filepath.Join(dir, file) {
			t.Errorf("%+v, %v", a, err)
		}
	}
	if err := s.DeactivateFor(ctx, "c"); err != nil {
		t.Error(err)
	}
	if err := s.DeactivateFor(ctx, "c"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := s.ActivateFor(ctx, "c", []*types.Mount{{Type: "tmpfs", Source: "none"}}); !errdefs.IsNotImplemented(err) {
		t.Error(err)
	}
	if _, err := s.Activate(ctx, "c", disk(filepath.Join(dir, "his")), Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ActivateFor(ctx, "c", disk(filepath.Join(dir, "one"))); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if err := s.DeactivateFor(ctx, "c"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := s.Deactivate(ctx, "c"); err != nil {
		t.Error(err)
	}
}
