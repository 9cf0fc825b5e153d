package transfer

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/leases"
)

// TestArchives: what is exported is imported elsewhere as the same, under the names that are asked for.
func TestArchives(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a:1", platforms.DefaultSpec(), 120, 1000, 100_000)
	if _, err := e.pull(e.ctx, "a:1", Image{}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	var told []string
	tell := func(p Progress) { told = append(told, p.Event) }
	if err := e.Export(e.ctx, &out, Image{References: []Reference{{Name: e.reg.host, Prefix: true}}}, archive.ExportOptions{}, tell); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(told, ","); got != "Exporting,Completed export" {
		t.Error(got)
	}
	other := newEnv(t, content.Shared)
	told = nil
	stored, err := other.Import(other.ctx, bytes.NewReader(out.Bytes()), Image{
		Name: "all:1", Unpacks: unpackHere(), References: []Reference{{Name: "import-x", Prefix: true, Overwrite: true, Digest: true}},
	}, false, tell)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{e.name("a:1"): true, "import-x@" + b.manifest.Digest.String(): true, "all:1": true}
	for _, i := range stored {
		if !want[i.Name] || i.Name != "all:1" && i.Target.Digest != b.manifest.Digest {
			t.Errorf("%+v", i)
		}
		delete(want, i.Name)
	}
	if len(want) > 0 {
		t.Errorf("there is no %v", want)
	}
	if got := strings.Join(told, ","); got != "Importing,saved,saved,saved,Completed import" {
		t.Error(got)
	}
	if l := other.labels(b.config.Digest); l["containerd.io/gc.ref.snapshot.native"] == "" {
		t.Errorf("%v", l)
	}
	other.clean(0)

	if _, err := other.Import(other.ctx, strings.NewReader("nonsense"), Image{}, false, nil); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if err := e.Export(e.ctx, &out, Image{Name: "nosuch"}, archive.ExportOptions{}, nil); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := e.Export(e.ctx, &out, Image{References: []Reference{{Name: "nosuch", Prefix: true}}}, archive.ExportOptions{}, nil); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := e.Export(context.Background(), &out, Image{Name: "x"}, archive.ExportOptions{}, nil); err == nil {
		t.Error("an export of no namespace")
	}
}

// TestImportKeeps: what an import finds in the store is its lease's from then on, and not lost to the collector.
func TestImportKeeps(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a:1", platforms.DefaultSpec(), 121, 1000)
	if _, err := e.pull(e.ctx, "a:1", Image{}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := e.Export(e.ctx, &out, Image{Name: e.name("a:1")}, archive.ExportOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	l, err := e.cfg.Leases.Create(e.ctx, "mine", nil)
	if err != nil {
		t.Fatal(err)
	}
	image := Image{References: []Reference{{Name: "import-x", Prefix: true, Overwrite: true}}}
	if _, err := e.Import(leases.With(e.ctx, l.ID), &out, image, false, nil); err != nil {
		t.Fatal(err)
	}
	held, err := e.cfg.Leases.ListResources(e.ctx, l.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range append([]ocispec.Descriptor{b.manifest, b.config}, b.layers...) {
		if !slices.Contains(held, leases.Resource{ID: d.Digest.String(), Type: leases.Content}) {
			t.Errorf("%s is not kept: %v", d.MediaType, held)
		}
	}
	if err := e.cfg.Content.Keep(e.ctx, digest.FromString("nosuch")); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// TestImported: names of an archive's images.
func TestImported(t *testing.T) {
	d := ocispec.Descriptor{Digest: digest.FromString("x")}
	at := "@" + d.Digest.String()
	for _, c := range []struct {
		ref        Reference
		named, tag string
		want       string
	}{
		{Reference{Name: "p", Prefix: true}, "", "1", "p:1"},
		{Reference{Name: "p", Prefix: true}, "docker.io/library/a:1", "", ""},
		{Reference{Name: "p", Prefix: true, Overwrite: true}, "docker.io/library/a:1", "", "docker.io/library/a:1"},
		{Reference{Name: "docker.io/library", Prefix: true}, "docker.io/library/a:1", "", "docker.io/library/a:1"},
		{Reference{Name: "docker.io/lib", Prefix: true}, "docker.io/library/a:1", "", ""},
		{Reference{Name: "p", Prefix: true, Digest: true}, "", "", "p" + at},
		{Reference{Name: "p", Prefix: true, Digest: true}, "", "1", "p:1 p" + at},
		{Reference{Name: "p", Prefix: true, Digest: true, SkipNamed: true}, "", "1", "p:1"},
		{Reference{Name: "p", Prefix: true, Digest: true, SkipNamed: true}, "", "", "p" + at},
		{Reference{Name: "p"}, "", "1", ""},
	} {
		if got := strings.Join(Image{References: []Reference{c.ref}}.imported(c.named, c.tag, d), " "); got != c.want {
			t.Errorf("%+v of %q, %q: %q, not %q", c.ref, c.named, c.tag, got, c.want)
		}
	}
}
