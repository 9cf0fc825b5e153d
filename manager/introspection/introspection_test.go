package introspection

import (
	"testing"

	"github.com/containerd/errdefs"
)

func TestRegistry(t *testing.T) {
	var r Registry
	for _, p := range []Plugin{
		{Type: TypeContent, ID: "content"},
		{Type: TypeSnapshotter, ID: "overlayfs", Platforms: []string{"linux/amd64"}},
		{Type: TypeSnapshotter, ID: "native", Platforms: []string{"linux/amd64"}, Capabilities: []string{"a", "b"}},
	} {
		r.Add(p)
	}
	for filter, want := range map[string]int{
		"": 3, "id==native": 1, "type==" + TypeSnapshotter: 2, "type==" + TypeSnapshotter + ",id==overlayfs": 1,
		"capabilities~=b": 1, "platforms": 2, "nothing": 0,
	} {
		var fs []string
		if filter != "" {
			fs = []string{filter}
		}
		if got, err := r.List(fs...); err != nil || len(got) != want {
			t.Errorf("%q: %v, %v", filter, got, err)
		}
	}
	if _, err := r.List("id="); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad filter: %v", err)
	}
	if _, err := r.Get(TypeContent, "other"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown plugin: %v", err)
	}
	if p, err := r.Get(TypeContent, "content"); err != nil || p.Name() != "io.containerd.content.v1.content" {
		t.Errorf("%v, %v", p, err)
	}
}

func TestIdentity(t *testing.T) {
	root := t.TempDir()
	first, err := Identity(root)
	if err != nil || len(first) != 36 || first[14] != '4' {
		t.Fatalf("%q, %v", first, err)
	}
	if again, err := Identity(root); err != nil || again != first {
		t.Errorf("%q, then %q: %v", first, again, err)
	}
	if other, err := Identity(t.TempDir()); err != nil || other == first {
		t.Errorf("two roots are both %q: %v", other, err)
	}
	if PIDNamespace() == 0 {
		t.Error("no pid namespace")
	}
}
