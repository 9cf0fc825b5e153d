package images

import (
	"context"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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

func target(s string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString(s), Size: 10, Annotations: map[string]string{"a": s}}
}

func TestImages(t *testing.T) {
	ctx, s := newStore(t)
	want := Image{Name: "docker.io/library/busybox:latest", Labels: map[string]string{"a.b/c": "1"}, Target: target("x")}
	made, err := s.Create(ctx, want)
	if err != nil || made.CreatedAt.IsZero() || !made.CreatedAt.Equal(made.UpdatedAt) {
		t.Fatalf("%v, %v", made, err)
	}
	if got, err := s.Get(ctx, want.Name); err != nil || !reflect.DeepEqual(got, made) {
		t.Errorf("%v instead of %v: %v", got, made, err)
	}
	if _, err := s.Create(ctx, want); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), want.Name) {
		t.Errorf("twice: %v", err)
	}
	other := namespaces.With(ctx, "two")
	if _, err := s.Get(other, want.Name); !errdefs.IsNotFound(err) {
		t.Errorf("in another namespace: %v", err)
	}
	if _, err := s.Create(other, want); err != nil {
		t.Errorf("the same name in another namespace: %v", err)
	}
	if err := s.Delete(ctx, want.Name, digest.FromString("y")); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "by now") {
		t.Errorf("another target: %v", err)
	}
	if err := s.Delete(ctx, want.Name, want.Target.Digest); err != nil {
		t.Error(err)
	}
	for _, name := range []string{want.Name, ""} {
		_, get := s.Get(ctx, name)
		_, up := s.Update(ctx, Image{Name: name})
		for verb, err := range map[string]error{"delete": s.Delete(ctx, name, ""), "get": get, "update": up} {
			if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `image "`+name+`"`) {
				t.Errorf("%s of a missing one: %v", verb, err)
			}
		}
	}
	if _, err := s.Get(other, want.Name); err != nil {
		t.Errorf("it is gone from the other namespace: %v", err)
	}
}

func TestInvalid(t *testing.T) {
	ctx, s := newStore(t)
	if _, err := s.Create(ctx, Image{Name: "good", Target: target("x")}); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Image){
		"media type": func(i *Image) { i.Target.MediaType = "" },
		"size 0":     func(i *Image) { i.Target.Size = 0 },
		"size -1":    func(i *Image) { i.Target.Size = -1 },
		"digest":     func(i *Image) { i.Target.Digest = "sha256:../../etc/passwd" },
		"sha256:12":  func(i *Image) { i.Target.Digest = "sha256:12" },
		"label":      func(i *Image) { i.Labels = map[string]string{"k": strings.Repeat("v", 5000)} },
	} {
		i := Image{Name: "bad", Target: target("x")}
		change(&i)
		if _, err := s.Create(ctx, i); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), `"bad"`) {
			t.Errorf("create with bad %s: %v", name, err)
		}
		i.Name = "good"
		if _, err := s.Update(ctx, i); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("update with bad %s: %v", name, err)
		}
	}
	for _, name := range []string{"", strings.Repeat("n", 40000)} {
		if _, err := s.Create(ctx, Image{Name: name, Target: target("x")}); !errdefs.IsInvalidArgument(err) || len(err.Error()) > 500 {
			t.Errorf("name of %d bytes: %.500v", len(name), err)
		}
	}
	if all, err := s.List(ctx, filters.Always); err != nil || len(all) != 1 || all[0].Target.Size != 10 {
		t.Errorf("%v, %v", all, err)
	}
}

func TestUpdate(t *testing.T) {
	ctx, s := newStore(t)
	labels := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	annotated := func(d ocispec.Descriptor, a map[string]string) ocispec.Descriptor { d.Annotations = a; return d }
	for i, c := range []struct {
		paths      []string
		wantLabels map[string]string
		wantTarget ocispec.Descriptor
	}{
		{nil, labels("l", "new", "n.x", "1"), target("new")},
		{[]string{"labels"}, labels("l", "new", "n.x", "1"), target("old")},
		{[]string{"labels.l"}, labels("l", "new", "gone", "1"), target("old")},
		{[]string{"labels.n.x", "labels.gone"}, labels("l", "old", "n.x", "1"), target("old")},
		{[]string{"target"}, labels("l", "old", "gone", "1"), target("new")},
		{[]string{"annotations"}, labels("l", "old", "gone", "1"), annotated(target("old"), labels("a", "new"))},
		{[]string{"annotations.a"}, labels("l", "old", "gone", "1"), annotated(target("old"), labels("a", "new"))},
		{[]string{"annotations.b"}, labels("l", "old", "gone", "1"), target("old")},
		{[]string{"labels", "target"}, labels("l", "new", "n.x", "1"), target("new")},
		{[]string{"name"}, nil, target("old")}, {[]string{"labels.l", "created_at"}, nil, target("old")}, {[]string{"target.digest"}, nil, target("old")},
		{[]string{""}, nil, target("old")},
	} {
		name := fmt.Sprint("i", i)
		before, err := s.Create(ctx, Image{Name: name, Labels: labels("l", "old", "gone", "1"), Target: target("old")})
		if err != nil {
			t.Fatal(err)
		}
		out, err := s.Update(ctx, Image{Name: name, Labels: labels("l", "new", "n.x", "1"), Target: target("new")}, c.paths...)
		got, gerr := s.Get(ctx, name)
		if gerr != nil {
			t.Fatal(gerr)
		}
		if c.wantLabels == nil { // refused, and nothing changed
			if last := c.paths[len(c.paths)-1]; !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), fmt.Sprintf("%q", last)) || !reflect.DeepEqual(got, before) {
				t.Errorf("%q: %v, %v", c.paths, got, err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got.Labels, c.wantLabels) || !reflect.DeepEqual(got.Target, c.wantTarget) || !reflect.DeepEqual(got, out) {
			t.Errorf("%q: %+v, answered %+v, %v", c.paths, got, out, err)
		}
		if !got.CreatedAt.Equal(before.CreatedAt) || got.UpdatedAt.Before(before.UpdatedAt) {
			t.Errorf("%q: times %v, %v", c.paths, before, got)
		}
	}
}

func TestFilters(t *testing.T) {
	ctx, s := newStore(t)
	for _, i := range []Image{
		{Name: "docker.io/library/a:1", Labels: map[string]string{"env": "prod", "a.b/c": "x,y"}, Target: target("1")},
		{Name: "docker.io/library/b:1", Labels: map[string]string{"env": "test"}, Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("2"), Size: 1}},
		{Name: "import-2020@sha256:abc", Target: target("3")},
	} {
		if _, err := s.Create(ctx, i); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		filters string // separated by ';'
		want    string
	}{
		{"", "a b i"}, {"name==docker.io/library/a:1", "a"}, {"name!=docker.io/library/a:1", "b i"}, {"name~=^docker.io/", "a b"},
		{`name~="library/[ab]:1$"`, "a b"}, {"labels.env", "a b"}, {"labels.env==prod", "a"}, {`labels."a.b/c"=="x,y"`, "a"},
		{"labels.env==prod,name~=/b:1/", ""}, {"labels.env==test,name~=/b:1/", "b"}, {"labels.env==prod;labels.env==test", "a b"},
		{"target.digest==" + digest.FromString("3").String(), "i"}, {"target.mediatype~=manifest", "b"}, {"annotations.a==3", "i"},
		{"target", ""}, {"unknown", ""}, {"labels.env!=prod", "b i"},
	} {
		var fs []string
		if c.filters != "" {
			fs = strings.Split(c.filters, ";")
		}
		f, err := filters.ParseAll(fs...)
		if err != nil {
			t.Fatal(err)
		}
		all, err := s.List(ctx, f)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, i := range all {
			got = append(got, strings.TrimPrefix(i.Name, "docker.io/library/")[:1])
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%q: %v, want %s", c.filters, got, c.want)
		}
	}
}
