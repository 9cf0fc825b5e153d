package leases

import (
	"context"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	grpcmetadata "google.golang.org/grpc/metadata"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
)

const blob = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

func newStore(t *testing.T) (context.Context, *Store) {
	t.Helper()
	db, err := metadata.Open(filepath.Join(t.TempDir(), "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return namespaces.With(context.Background(), "one"), NewStore(db)
}

func TestLeases(t *testing.T) {
	ctx, s := newStore(t)
	labels := map[string]string{ExpireLabel: "2030-01-01T00:00:00Z", "a.b": "x"}
	l, err := s.Create(ctx, "l1", labels)
	if err != nil || l.ID != "l1" || l.CreatedAt.IsZero() || !reflect.DeepEqual(l.Labels, labels) {
		t.Fatalf("%v, %v", l, err)
	}
	if _, err := s.Create(ctx, "l1", nil); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), `"l1"`) {
		t.Errorf("twice: %v", err)
	}
	r1, err := s.Create(ctx, "", nil)
	if err != nil || r1.ID == "" {
		t.Fatal(r1, err)
	}
	if r2, err := s.Create(ctx, "", nil); err != nil || r2.ID == r1.ID {
		t.Error(r2, err)
	}
	for _, good := range []string{"3xQb+/=-_:Z", strings.Repeat("l", maxID)} { // clients' own, of base64
		if _, err := s.Create(ctx, good, nil); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{" ", "a b", "a\x00", "a\n", "\x7f", strings.Repeat("l", maxID+1)} {
		if _, err := s.Create(ctx, bad, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := s.Create(ctx, "big", map[string]string{"k": strings.Repeat("v", 5000)}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("label: %v", err)
	}
	for filter, want := range map[string]int{"": 5, "id==l1": 1, `labels."a.b"==x`: 1, `labels."containerd.io/gc.expire"`: 1, "labels": 0, "id!=l1": 4, "nothing": 0} {
		f, err := filters.Parse(filter)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.List(ctx, f); err != nil || len(got) != want {
			t.Errorf("%q: %v, %v", filter, got, err)
		}
	}
	other := namespaces.With(ctx, "two")
	if got, err := s.List(other, filters.Always); err != nil || len(got) != 0 {
		t.Errorf("another namespace has %v, %v", got, err)
	}
	if err := s.Delete(other, "l1"); !errdefs.IsNotFound(err) {
		t.Errorf("of another namespace: %v", err)
	}
	if err := s.Delete(ctx, "l1"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"l1", ""} {
		if err := s.Delete(ctx, id); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"`+id+`"`) {
			t.Errorf("%q again: %v", id, err)
		}
	}
}

func TestResources(t *testing.T) {
	ctx, s := newStore(t)
	if _, err := s.Create(ctx, "l", nil); err != nil {
		t.Fatal(err)
	}
	good := []Resource{{blob, Content}, {"docker.io/x:1", Images}, {"layer-sha256:x", Ingests}, {"a/b", Snapshots + "native"}, {"k", Snapshots + "overlayfs"}}
	for _, r := range append(good, good...) { // the second time changes nothing
		if err := s.AddResource(ctx, "l", r); err != nil {
			t.Errorf("%v: %v", r, err)
		}
	}
	if got, err := s.ListResources(ctx, "l"); err != nil || !reflect.DeepEqual(got, good) {
		t.Errorf("%v, %v", got, err)
	}
	for _, c := range []struct {
		r  Resource
		is func(error) bool
	}{
		{Resource{"", Content}, errdefs.IsInvalidArgument}, {Resource{"a", Content}, errdefs.IsInvalidArgument},
		{Resource{"sha256:a", Content}, errdefs.IsInvalidArgument}, {Resource{"a", "snapshots"}, errdefs.IsInvalidArgument},
		{Resource{"a", "snapshots/"}, errdefs.IsInvalidArgument}, {Resource{"a", "snapshots/a/b"}, errdefs.IsInvalidArgument},
		{Resource{blob, "content/x"}, errdefs.IsInvalidArgument}, {Resource{"a\x00b", Ingests}, errdefs.IsInvalidArgument},
		{Resource{strings.Repeat("r", 40000), Ingests}, errdefs.IsInvalidArgument},
		{Resource{"a", "volumes"}, errdefs.IsNotImplemented}, {Resource{"a", ""}, errdefs.IsNotImplemented},
	} {
		for verb, err := range map[string]error{"add": s.AddResource(ctx, "l", c.r), "delete": s.DeleteResource(ctx, "l", c.r)} {
			if !c.is(err) || len(err.Error()) > 300 {
				t.Errorf("%s %.80v: %v", verb, c.r, err)
			}
		}
	}
	if err := s.DeleteResource(ctx, "l", good[0]); err != nil {
		t.Error(err)
	}
	if err := s.DeleteResource(ctx, "l", good[0]); err != nil {
		t.Errorf("twice: %v", err)
	}
	if got, err := s.ListResources(ctx, "l"); err != nil || !reflect.DeepEqual(got, good[1:]) {
		t.Errorf("%v, %v", got, err)
	}
	_, list := s.ListResources(ctx, "x")
	for verb, err := range map[string]error{"add": s.AddResource(ctx, "x", good[0]), "delete": s.DeleteResource(ctx, "x", good[0]), "list": list} {
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"x"`) {
			t.Errorf("%s of an unknown lease: %v", verb, err)
		}
	}
	// A lease of the same name that comes later keeps nothing of the earlier one.
	if err := s.Delete(ctx, "l"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, "l", nil); err != nil {
		t.Fatal(err)
	}
	if got, err := s.ListResources(ctx, "l"); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

// TestContext: work under a lease is kept by it, within the transaction that does the work.
func TestContext(t *testing.T) {
	ctx, s := newStore(t)
	if _, err := s.Create(ctx, "l", nil); err != nil {
		t.Fatal(err)
	}
	r := Resource{"k", Snapshots + "native"}
	attach := func(ctx context.Context) error {
		return s.db.Update(func(tx *metadata.Tx) error { return Attach(ctx, tx, "one", r) })
	}
	detach := func(ctx context.Context) error {
		return s.db.Update(func(tx *metadata.Tx) error { return Detach(ctx, tx, "one", r) })
	}
	if err := attach(ctx); err != nil {
		t.Errorf("without a lease: %v", err)
	}
	if got, _ := s.ListResources(ctx, "l"); len(got) != 0 {
		t.Errorf("without a lease: %v", got)
	}
	sent := grpcmetadata.NewIncomingContext(ctx, grpcmetadata.Pairs(Header, "l"))
	for name, c := range map[string]context.Context{"ours": With(ctx, "l"), "a client's": sent} {
		if err := detach(c); err != nil {
			t.Errorf("%s: detach of nothing: %v", name, err)
		}
		if err := attach(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, _ := s.ListResources(ctx, "l"); !reflect.DeepEqual(got, []Resource{r}) {
			t.Errorf("%s: %v", name, got)
		}
		if err := detach(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, _ := s.ListResources(ctx, "l"); len(got) != 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
	if err := attach(With(ctx, "x")); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"x"`) {
		t.Errorf("unknown lease: %v", err)
	}
	if id, ok := From(With(sent, "")); ok {
		t.Errorf("none is asked for, %q found", id)
	}
	md, _ := grpcmetadata.FromOutgoingContext(With(With(ctx, "a"), "b"))
	if v := md.Get(Header); len(v) != 1 || v[0] != "b" || len(md.Get(namespaces.Header)) != 1 {
		t.Errorf("gRPC sends %v", md)
	}
}

func TestNoNamespace(t *testing.T) {
	_, s := newStore(t)
	ctx := context.Background()
	_, create := s.Create(ctx, "l", nil)
	_, list := s.List(ctx, filters.Always)
	_, resources := s.ListResources(ctx, "l")
	for verb, err := range map[string]error{
		"create": create, "list": list, "resources": resources, "delete": s.Delete(ctx, "l"),
		"add": s.AddResource(ctx, "l", Resource{"k", Ingests}), "remove": s.DeleteResource(ctx, "l", Resource{"k", Ingests}),
	} {
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", verb, err)
		}
	}
}
