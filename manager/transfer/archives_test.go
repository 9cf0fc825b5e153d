package transfer

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/content"
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
