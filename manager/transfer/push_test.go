package transfer

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
)

var (
	amd = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	arm = ocispec.Platform{OS: "linux", Architecture: "arm64"}
)

// TestPush: an index, or one image of it, goes to a registry, is not sent twice, and is taken from another repository.
func TestPush(t *testing.T) {
	e := newEnv(t, content.Shared)
	a, b := e.reg.image("", amd, 80, 1000, 200_000), e.reg.image("", arm, 90, 1000)
	index := e.reg.index("a:1", a.manifest, b.manifest)
	if _, err := e.pull(e.ctx, "a:1", Image{}); err != nil {
		t.Fatal(err)
	}
	to := newFakeRegistry(t)
	push := func(host, repo string, i Image) (map[string]Progress, error) {
		told := map[string]Progress{}
		i.Name = e.name("a:1")
		name := host + "/" + repo
		return told, e.Push(e.ctx, name, e.open, i, func(p Progress) { told[p.Name] = p })
	}
	told, err := push(to.host, "x/y:2", Image{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range append([]ocispec.Descriptor{index, a.manifest, b.manifest, a.config, b.config}, append(a.layers, b.layers...)...) {
		if int64(len(to.blobs[d.Digest])) != d.Size {
			t.Errorf("%s %s is not at the registry", d.MediaType, d.Digest)
		}
	}
	if to.tags["x/y:2"] != index.Digest || len(to.tags) != 1 {
		t.Errorf("tags %v", to.tags)
	}
	if p := told["layer-"+a.layers[1].Digest.String()]; p.Event != eventComplete || p.Progress != a.layers[1].Size {
		t.Errorf("%+v", p)
	}
	if !strings.HasPrefix(told[""].Event, "Completed push to OCI Registry (") || told[to.host+"/x/y:2"].Event != "pushed content" {
		t.Errorf("%+v", told)
	}
	if told, err = push(to.host, "x/y:3", Image{}); err != nil || told["layer-"+a.layers[1].Digest.String()].Event != eventExists {
		t.Errorf("a second time: %+v, %v", told, err)
	}
	if _, err := push(to.host, "z:arm", Image{Platforms: []ocispec.Platform{arm}}); err != nil || to.tags["z:arm"] != b.manifest.Digest {
		t.Errorf("one platform: %v, %v", to.tags, err)
	}
	if _, err := push(to.host, "z:none", Image{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "mips"}}}); !errdefs.IsNotFound(err) {
		t.Errorf("a platform that there is not: %v", err)
	}

	// The registry it came from has the blobs, in another repository.
	e.reg.hide = "c"
	if _, err := push(e.reg.host, "c:1", Image{}); err != nil {
		t.Fatal(err)
	}
	if len(e.reg.mounts) != 5 || slices.ContainsFunc(e.reg.mounts, func(from string) bool { return from != "a" }) {
		t.Errorf("mounted %v", e.reg.mounts)
	}

	// An index of which only a part is here cannot be sent whole.
	if err := e.cfg.Content.Delete(e.ctx, b.manifest.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := push(newFakeRegistry(t).host, "x:1", Image{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "name one of its platforms") {
		t.Errorf("%v", err)
	}
	e.clean(0)
}

// TestTag: an image gets another name, and keeps its labels.
func TestTag(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a:1", amd, 100, 10)
	if _, err := e.pull(e.ctx, "a:1", Image{Labels: map[string]string{"k": "v"}}); err != nil {
		t.Fatal(err)
	}
	if err := e.Tag(e.ctx, Image{Name: e.name("a:1")}, Image{Name: "new:1"}); err != nil {
		t.Fatal(err)
	}
	if i, err := e.cfg.Images.Get(e.ctx, "new:1"); err != nil || i.Target.Digest != b.manifest.Digest || i.Labels["k"] != "v" {
		t.Errorf("%+v, %v", i, err)
	}
	if err := e.Tag(e.ctx, Image{Name: "nosuch"}, Image{Name: "x"}); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := e.Tag(e.ctx, Image{Name: "new:1"}, Image{}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	e.clean(0)
}
