package transfer

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/snapshots/native"
)

// TestPullProcessed: an image with an encrypted layer is pulled and unpacked as the program decodes it; without the
// program, or when it fails, the error says so, and there is no image.
func TestPullProcessed(t *testing.T) {
	const encrypted = ocispec.MediaTypeImageLayerGzip + "+encrypted"
	e := newEnv(t, content.Shared)
	data, id := layer(1, 300_000)
	for i := range data {
		data[i] ^= 0xff
	}
	l := e.reg.add(encrypted, data)
	image, err := json.Marshal(ocispec.Image{
		Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{id}}})
	if err != nil {
		t.Fatal(err)
	}
	config := e.reg.add(ocispec.MediaTypeImageConfig, image)
	e.reg.manifest("a:1", ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{l}})

	decoder := diff.Processor{ID: "invert", Accepts: []string{encrypted}, Returns: ocispec.MediaTypeImageLayerGzip, Path: "perl"}
	for _, c := range []struct {
		args []string
		want string // in the error
	}{
		{nil, encrypted},
		{[]string{"-e", `print STDERR "no key"; exit 1`}, "stream processor invert failed: exit status 1: no key"},
		{[]string{"-0777", "-pe", "$_ = ~$_"}, ""},
	} {
		e.cfg.Apply.Processors = nil
		if c.args != nil {
			decoder.Args = c.args
			e.cfg.Apply.Processors = diff.Processors{decoder}
		}
		_, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()})
		_, ierr := e.cfg.Images.Get(e.ctx, e.name("a:1"))
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) || ierr == nil {
				t.Errorf("%v: not %q; image: %v", err, c.want, ierr)
			}
			continue
		}
		if err != nil || ierr != nil {
			t.Fatal(err, ierr)
		}
	}
	s, err := e.cfg.Snapshots.Snapshotter(native.Name)
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := s.View(e.ctx, "look", identity.ChainID([]digest.Digest{id}).String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(mounts[0].Source, "f1")); err != nil || fi.Size() != 300_000 {
		t.Error(fi, err)
	}
	if got := e.labels(l.Digest)[diff.LabelUncompressed]; got != id.String() {
		t.Errorf("label %q", got)
	}
	e.clean(0)
}
