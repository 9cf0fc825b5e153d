package transfer

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/transfer/wish"
)

// TestPullMetadataOnly: manifests and configs for all platforms come, and no layers.
func TestPullMetadataOnly(t *testing.T) {
	e := newEnv(t, content.Shared)
	a, b := e.reg.image("", amd, 140, 1000), e.reg.image("", arm, 150, 1000)
	index := e.reg.index("a:1", a.manifest, b.manifest)
	image := Image{Platforms: []ocispec.Platform{amd}, Wish: wish.Wish{MetadataOnly: true}}
	if _, err := e.pull(e.ctx, "a:1", image); err != nil {
		t.Fatal(err)
	}
	for _, d := range []ocispec.Descriptor{index, a.manifest, a.config, b.manifest, b.config} {
		if !e.here(e.ctx, d) {
			t.Errorf("%s %s has not come", d.MediaType, d.Digest)
		}
	}
	for _, l := range append(a.layers, b.layers...) {
		if e.here(e.ctx, l) || e.reg.bytes(l.Digest) > 0 {
			t.Errorf("layer %s has come", l.Digest)
		}
	}
	if l := e.labels(b.manifest.Digest); l[labelLayer+"0"] != b.layers[0].Digest.String() {
		t.Errorf("the collector finds %v", l)
	}
	image.Unpacks = unpackHere()
	if _, err := e.pull(e.ctx, "a:1", image); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unpacked: %v", err)
	}
	e.clean(0)
}

// barrier waits until n have come, or too long.
type barrier struct {
	sync.Mutex
	n    int
	full chan struct{}
}

func (b *barrier) wait(ctx context.Context) error {
	b.Lock()
	if b.n--; b.n == 0 {
		close(b.full)
	}
	b.Unlock()
	select {
	case <-b.full:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(within / 2):
		return errors.New("the others do not come")
	}
}

// meeting is a repository to which layers are sent when all have met.
type meeting struct {
	Remote
	*barrier
}

func (m meeting) Push(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt) error {
	if desc.MediaType == ocispec.MediaTypeImageLayerGzip {
		if err := m.wait(ctx); err != nil {
			return err
		}
	}
	return m.Remote.Push(ctx, desc, content)
}

// TestConcurrent: as many layers as are asked for move at the same time, and no more.
func TestConcurrent(t *testing.T) {
	const many = 5 // more than the configuration says
	e := newEnv(t, content.Shared)
	e.reg.image("a:1", amd, 160, 1000, 1000, 1000, 1000, 1000)
	one := e.reg.image("b:1", amd, 170, 1000, 1000, 1000)
	met := &barrier{n: many, full: make(chan struct{})}
	e.reg.serve = func(_ http.ResponseWriter, r *http.Request, _ digest.Digest, data []byte) bool {
		if data[0] == '{' { // no layer
			return false
		}
		if err := met.wait(r.Context()); err != nil {
			t.Errorf("pull: %v", err)
		}
		return false
	}
	if _, err := e.pull(e.ctx, "a:1", Image{Wish: wish.Wish{Concurrent: many}}); err != nil {
		t.Fatal(err)
	}
	met = &barrier{n: many, full: make(chan struct{})}
	open := func(ref string) (Remote, error) {
		r, err := e.open(ref)
		return meeting{r, met}, err
	}
	image := Image{Name: e.name("a:1"), Wish: wish.Wish{Concurrent: many}}
	if err := e.Push(e.ctx, newFakeRegistry(t).host+"/a:1", open, image, nil); err != nil {
		t.Errorf("push: %v", err)
	}

	e.reg.most = 0
	e.reg.serve = func(http.ResponseWriter, *http.Request, digest.Digest, []byte) bool {
		time.Sleep(20 * time.Millisecond) // for others to come meanwhile
		return false
	}
	if _, err := e.pull(e.ctx, "b:1", Image{Wish: wish.Wish{Concurrent: 1}}); err != nil {
		t.Fatal(err)
	}
	if e.reg.most != 1 || !e.here(e.ctx, one.layers[2]) {
		t.Errorf("%d at the same time", e.reg.most)
	}
}

// TestPushTarget: a manifest that no image has is pushed, and layers that are not to be distributed if that is asked for.
func TestPushTarget(t *testing.T) {
	e := newEnv(t, content.Shared)
	e.reg.image("a:1", amd, 180, 1000)
	if _, err := e.pull(e.ctx, "a:1", Image{}); err != nil {
		t.Fatal(err)
	}
	write := func(mediaType string, data []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		w, err := e.blobs.Create(e.ctx, "write-"+d.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(data)
		if err := errors.Join(err, w.Commit(e.ctx, d.Size, d.Digest, nil), w.Close()); err != nil {
			t.Fatal(err)
		}
		return d
	}
	config := write(ocispec.MediaTypeImageConfig, []byte(`{"architecture":"amd64","os":"linux"}`))
	foreign := write("application/vnd.oci.image.layer.nondistributable.v1.tar", []byte("not for everybody"))
	data, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{foreign},
	})
	if err != nil {
		t.Fatal(err)
	}
	target := write(ocispec.MediaTypeImageManifest, data)
	target.Size = 0 // who asks need not know it
	to := newFakeRegistry(t)
	push := func(ref string, w wish.Wish) error {
		return e.Push(e.ctx, to.host+"/"+ref, e.open, Image{Wish: w}, nil)
	}
	if err := push("x:1", wish.Wish{Target: &target}); err != nil {
		t.Fatal(err)
	}
	if to.tags["x:1"] != target.Digest || to.blobs[foreign.Digest] != nil {
		t.Errorf("tags %v, %d bytes of what is not to be distributed", to.tags, len(to.blobs[foreign.Digest]))
	}
	to = newFakeRegistry(t)
	if err := push("x:1", wish.Wish{Target: &target, Foreign: true}); err != nil {
		t.Fatal(err)
	}
	if string(to.blobs[foreign.Digest]) != "not for everybody" {
		t.Errorf("%q of what is not to be distributed", to.blobs[foreign.Digest])
	}
	if err := push("x:2", wish.Wish{Target: &foreign}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a layer as an image: %v", err)
	}
	nothing := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("nothing")}
	if err := push("x:2", wish.Wish{Target: &nothing}); !errdefs.IsNotFound(err) {
		t.Errorf("what is not there: %v", err)
	}
	if err := e.cfg.Content.Delete(e.ctx, foreign.Digest); err != nil {
		t.Fatal(err)
	}
	to = newFakeRegistry(t)
	if err := push("x:3", wish.Wish{Target: &target, Foreign: true}); !errdefs.IsNotFound(err) || to.tags["x:3"] != "" {
		t.Errorf("with a layer missing: %v, %v", err, to.tags)
	}
	e.clean(0)
}
