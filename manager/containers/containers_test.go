package containers

import (
	"context"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
)

func newStore(t *testing.T) (context.Context, *Store) {
	t.Helper()
	db, err := metadata.Open(filepath.Join(t.TempDir(), "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return namespaces.With(context.Background(), "one"), NewStore(db)
}

func body(s string) *anypb.Any { return &anypb.Any{TypeUrl: "types/" + s, Value: []byte(s)} }

// full has every field set to something of s.
func full(id, s string) Container {
	return Container{
		ID: id, Labels: map[string]string{"l": s, "only." + s: "1"}, Image: "image-" + s, Runtime: Runtime{Name: "io.containerd.runc.v2", Options: body(s)},
		Spec: body("spec-" + s), Snapshotter: "overlayfs", SnapshotKey: "key-" + s, SandboxID: "sandbox-" + s,
		Extensions: map[string]*anypb.Any{"e": body(s), "only." + s: body("1")},
	}
}

// shown compares and shows containers; their times are left out.
func shown(c Container) string {
	text := func(a *anypb.Any) string { return a.GetTypeUrl() + "=" + string(a.GetValue()) }
	ext := map[string]string{}
	for k, v := range c.Extensions {
		ext[k] = text(v)
	}
	return fmt.Sprint(c.ID, c.Labels, c.Image, c.Runtime.Name, text(c.Runtime.Options), text(c.Spec), c.Snapshotter, c.SnapshotKey, c.SandboxID, ext)
}

func TestContainers(t *testing.T) {
	ctx, s := newStore(t)
	want := full("c1", "x")
	made, err := s.Create(ctx, want)
	if err != nil || made.CreatedAt.IsZero() || !made.CreatedAt.Equal(made.UpdatedAt) || shown(made) != shown(want) {
		t.Fatalf("%v, %v", made, err)
	}
	got, err := s.Get(ctx, "c1")
	if err != nil || shown(got) != shown(want) || !got.CreatedAt.Equal(made.CreatedAt) || !proto.Equal(got.Spec, want.Spec) {
		t.Errorf("%v instead of %v: %v", got, want, err)
	}
	if _, err := s.Create(ctx, full("c1", "y")); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), `"c1"`) {
		t.Errorf("twice: %v", err)
	}
	if got, _ := s.Get(ctx, "c1"); shown(got) != shown(want) {
		t.Errorf("changed by a create that failed: %v", got)
	}
	other := namespaces.With(ctx, "two")
	if _, err := s.Create(other, full("c1", "y")); err != nil {
		t.Errorf("the same id in another namespace: %v", err)
	}
	if err := s.Delete(ctx, "c1"); err != nil {
		t.Error(err)
	}
	for _, id := range []string{"c1", "", "../c1"} {
		_, get := s.Get(ctx, id)
		_, up := s.Update(ctx, full(id, "x"))
		for verb, err := range map[string]error{"delete": s.Delete(ctx, id), "get": get, "update": up} {
			if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `container "`+id+`"`) {
				t.Errorf("%s of a missing one: %v", verb, err)
			}
		}
	}
	if _, err := s.Get(other, "c1"); err != nil {
		t.Errorf("it is gone from the other namespace: %v", err)
	}
	_, err = s.Get(context.Background(), "c1")
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a namespace: %v", err)
	}
}

func TestInvalid(t *testing.T) {
	ctx, s := newStore(t)
	for says, change := range map[string]func(*Container){
		"identifier": func(c *Container) { c.ID = "a/b" }, "must not be empty": func(c *Container) { c.ID = "" },
		"longer than 76": func(c *Container) { c.ID = strings.Repeat("a", 77) },
		"runtime.name":   func(c *Container) { c.Runtime.Name = "" }, "spec is missing": func(c *Container) { c.Spec = nil },
		"needs a snapshotter": func(c *Container) { c.Snapshotter = "" }, "extension": func(c *Container) { c.Extensions = map[string]*anypb.Any{"": body("x")} },
		"label": func(c *Container) { c.Labels = map[string]string{"k": strings.Repeat("v", 5000)} },
	} {
		c := full("bad", "x")
		change(&c)
		if _, err := s.Create(ctx, c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "cannot create container") {
			t.Errorf("%s: %v", says, err)
		}
	}
	if all, err := s.List(ctx, filters.Always); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}

func TestUpdate(t *testing.T) {
	ctx, s := newStore(t)
	old := func(id string) Container { return full(id, "old") }
	for i, c := range []struct {
		paths []string
		want  func(c *Container) // what becomes of the old one; nil: refused
	}{
		{nil, func(c *Container) {
			n := full(c.ID, "new")
			c.Labels, c.Spec, c.Extensions, c.Image, c.SnapshotKey = n.Labels, n.Spec, n.Extensions, n.Image, n.SnapshotKey
		}},
		{[]string{"labels"}, func(c *Container) { c.Labels = full("", "new").Labels }},
		{[]string{"labels.l"}, func(c *Container) { c.Labels["l"] = "new" }},
		{[]string{"labels.only.new"}, func(c *Container) { c.Labels["only.new"] = "1" }},
		{[]string{"labels.only.old"}, func(c *Container) { delete(c.Labels, "only.old") }},
		{[]string{"spec"}, func(c *Container) { c.Spec = body("spec-new") }},
		{[]string{"image"}, func(c *Container) { c.Image = "image-new" }},
		{[]string{"snapshotkey"}, func(c *Container) { c.SnapshotKey = "key-new" }},
		{[]string{"snapshot_key"}, func(c *Container) { c.SnapshotKey = "key-new" }},
		{[]string{"extensions"}, func(c *Container) { c.Extensions = full("", "new").Extensions }},
		{[]string{"extensions.e"}, func(c *Container) { c.Extensions["e"] = body("new") }},
		{[]string{"extensions.only.new", "extensions.only.old"}, func(c *Container) {
			c.Extensions["only.new"] = body("1")
			delete(c.Extensions, "only.old")
		}},
		{[]string{"image", "labels.l"}, func(c *Container) { c.Image, c.Labels["l"] = "image-new", "new" }},
		{[]string{"id"}, nil}, {[]string{"runtime"}, nil}, {[]string{"snapshotter"}, nil}, {[]string{"runtime.name"}, nil}, {[]string{"image", "created_at"}, nil},
		{[]string{""}, nil}, {[]string{"sandbox"}, nil}, {[]string{"image.x"}, nil},
	} {
		id := fmt.Sprint("c", i)
		before, err := s.Create(ctx, old(id))
		if err != nil {
			t.Fatal(err)
		}
		out, err := s.Update(ctx, full(id, "new"), c.paths...)
		got, gerr := s.Get(ctx, id)
		if gerr != nil {
			t.Fatal(gerr)
		}
		want := old(id)
		if c.want == nil {
			if last := c.paths[len(c.paths)-1]; !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), fmt.Sprintf("%q", last)) || shown(got) != shown(want) {
				t.Errorf("%q: %s, %v", c.paths, shown(got), err)
			}
			continue
		}
		c.want(&want)
		if err != nil || shown(got) != shown(want) || shown(out) != shown(want) {
			t.Errorf("%q:\n%s instead of\n%s, %v", c.paths, shown(got), shown(want), err)
		}
		if !got.CreatedAt.Equal(before.CreatedAt) || got.UpdatedAt.Before(before.UpdatedAt) {
			t.Errorf("%q: times %v, %v", c.paths, before, got)
		}
	}
	// Without a mask, what cannot change must not differ.
	if _, err := s.Create(ctx, old("fixed")); err != nil {
		t.Fatal(err)
	}
	for says, change := range map[string]func(*Container){
		"snapshotter cannot": func(c *Container) { c.Snapshotter = "native" }, "runtime.name cannot": func(c *Container) { c.Runtime.Name = "other" },
		"spec is missing": func(c *Container) { c.Spec = nil },
	} {
		c := old("fixed")
		change(&c)
		if _, err := s.Update(ctx, c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
}

func TestFilters(t *testing.T) {
	ctx, s := newStore(t)
	for _, id := range []string{"a", "b"} {
		c := full(id, id)
		c.Labels["io.cri/kind"] = "container"
		if _, err := s.Create(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	bare := Container{ID: "z", Runtime: Runtime{Name: "other"}, Spec: body("z")}
	if _, err := s.Create(ctx, bare); err != nil {
		t.Fatal(err)
	}
	for filter, want := range map[string]string{
		"": "abz", "id==a": "a", "id!=a": "bz", "id~=[ab]": "ab", "image==image-a": "a", "image": "ab", "runtime.name==other": "z", "runtime.name": "abz", "runtime": "",
		"snapshotter==overlayfs": "ab", "labels.l==b": "b", `labels."io.cri/kind"==container`: "ab", `labels."only.a"`: "a", "labels.only.a": "a",
		"id==a,labels.l==b": "", "unknown": "", "snapshotter!=overlayfs": "z",
	} {
		f, err := filters.Parse(filter)
		if err != nil {
			t.Fatal(err)
		}
		all, err := s.List(ctx, f)
		var got string
		for _, c := range all {
			got += c.ID
		}
		if err != nil || got != want {
			t.Errorf("%q: %s, want %s: %v", filter, got, want, err)
		}
	}
	if got, err := s.Get(ctx, "z"); err != nil || got.Extensions != nil || got.Runtime.Options != nil || !reflect.DeepEqual(got.Labels, map[string]string(nil)) {
		t.Errorf("%+v, %v", got, err)
	}
}
