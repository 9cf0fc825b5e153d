package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/platforms"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/shimapi/mount"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

var (
	pullKills = flag.Int("pull.kills", 4, "how often managerd is killed in TestPullKilled")
	pullSize  = flag.Int64("pull.size", 48, "MiB of the image of TestPullKilled")
	pullRate  = flag.Int64("pull.rate", 40, "MiB a second that the registry of TestPullKilled sends")
)

// noise is an image of layers that no compression makes smaller.
type noise struct {
	ref    string // REGISTRY/REPO:TAG
	target ocispec.Descriptor
	layers []ocispec.Descriptor
	files  []string // of each layer: the sha256 of its one file, fN
	chain  string
}

// upload puts a blob, or with a media type a manifest, into a registry.
func upload(t *testing.T, registry, repo, mediaType, tag string, data []byte) ocispec.Descriptor {
	t.Helper()
	d := digest.FromBytes(data)
	where := registry + "/v2/" + repo + "/manifests/" + tag
	if tag == "" {
		resp, err := http.Post(registry+"/v2/"+repo+"/blobs/uploads/", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		to, err := resp.Location()
		if err != nil {
			t.Fatal(err)
		}
		q := to.Query()
		q.Set("digest", d.String())
		to.RawQuery = q.Encode()
		where = to.String()
	}
	req, err := http.NewRequest(http.MethodPut, where, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(resp.Body)
		t.Fatalf("the registry answers %s: %s", resp.Status, text)
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// makeNoise pushes an image with layers of these sizes.
func makeNoise(t *testing.T, registry, repo string, seed byte, sizes ...int64) *noise {
	t.Helper()
	n := &noise{}
	var ids []digest.Digest
	for i, size := range sizes {
		data := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{seed, byte(i), 7}).Read(data)
		sum := sha256.Sum256(data)
		n.files = append(n.files, hex.EncodeToString(sum[:]))
		var packed bytes.Buffer
		z, err := gzip.NewWriterLevel(&packed, gzip.NoCompression)
		if err != nil {
			t.Fatal(err)
		}
		id := digest.Canonical.Digester()
		w := tar.NewWriter(io.MultiWriter(z, id.Hash()))
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("f%d", i), Mode: 0o644, Size: size, Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id.Digest())
		n.layers = append(n.layers, upload(t, registry, repo, ocispec.MediaTypeImageLayerGzip, "", packed.Bytes()))
	}
	config, err := json.Marshal(ocispec.Image{Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: upload(t, registry, repo, ocispec.MediaTypeImageConfig, "", config), Layers: n.layers,
	})
	if err != nil {
		t.Fatal(err)
	}
	n.target = upload(t, registry, repo, ocispec.MediaTypeImageManifest, "latest", manifest)
	n.chain = identity.ChainID(ids).String()
	return n
}

// whole fails the test unless the image has its name, and its snapshot the files.
func (n *noise) whole(t *testing.T, d *harness.Daemon) {
	t.Helper()
	conn, err := d.Conn()
	if err != nil {
		t.Fatal(err)
	}
	ctx := d.Context(context.Background())
	i, err := imagesapi.NewImagesClient(conn).Get(ctx, &imagesapi.GetImageRequest{Name: n.ref})
	if err != nil || i.Image.Target.Digest != n.target.Digest.String() {
		t.Fatalf("%v, %v", i, err)
	}
	for _, l := range n.layers {
		if _, err := contentapi.NewContentClient(conn).Info(ctx, &contentapi.InfoRequest{Digest: l.Digest.String()}); err != nil {
			t.Error(err)
		}
	}
	s := snapshots.NewSnapshotsClient(conn)
	v, err := s.View(ctx, &snapshots.ViewSnapshotRequest{Snapshotter: snapshotter, Key: "look", Parent: n.chain, Labels: map[string]string{"containerd.io/gc.root": "test"}})
	if err != nil {
		t.Fatal(err)
	}
	err = mount.WithTemp(v.Mounts, func(root string) error {
		for i, want := range n.files {
			f, err := os.Open(filepath.Join(root, fmt.Sprintf("f%d", i)))
			if err != nil {
				return err
			}
			sum := sha256.New()
			_, err = io.Copy(sum, f)
			_ = f.Close()
			if got := hex.EncodeToString(sum.Sum(nil)); err != nil || got != want {
				return fmt.Errorf("file %d: %s, not %s, %w", i, got, want, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := s.Remove(ctx, &snapshots.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: "look"}); err != nil {
		t.Error(err)
	}
}

// offsets are how many bytes of each layer the daemon has.
func (n *noise) offsets(t *testing.T, d *harness.Daemon) (out []int64) {
	t.Helper()
	conn, err := d.Conn()
	if err != nil {
		t.Fatal(err)
	}
	ctx := d.Context(context.Background())
	c := contentapi.NewContentClient(conn)
	for _, l := range n.layers {
		if i, err := c.Info(ctx, &contentapi.InfoRequest{Digest: l.Digest.String()}); err == nil {
			out = append(out, i.Info.Size)
			continue
		}
		st, err := c.Status(ctx, &contentapi.StatusRequest{Ref: "layer-" + l.Digest.String()})
		out = append(out, st.GetStatus().GetOffset())
		if err != nil && code(err) != "NotFound" {
			t.Fatal(err)
		}
	}
	return out
}

// TestPullKilled: managerd is killed again and again in the middle of a pull. Each time it goes on where it was: of no
// layer more than a MiB is fetched again, and the image is right in the end. -pull.kills=50 -pull.size=300 is the show.
func TestPullKilled(t *testing.T) {
	const most = 1 << 20
	registry := regproxy.Start(t, regproxy.Options{})
	m := newMeter(t, registry.URL(), *pullRate<<20)
	unit := *pullSize << 20 / 24
	n := makeNoise(t, registry.URL(), "noise", 1, unit, 12*unit, 4*unit, 5*unit, unit, unit)
	n.ref = m.addr + "/noise:latest"

	d := harness.Test(t, bin)
	pulled := make(chan error, 1)
	pull := func() {
		mv := newMover(t, d)
		go func() {
			_, err := mv.move(plain(n.ref), stored(n.ref))
			pulled <- err
		}()
	}
	lost := make([]int64, len(n.layers)) // bytes that came and were not kept, so far
	var worst, sum int64
	share := *pullSize << 20 / int64(*pullKills+1)
	began := time.Now()
	for k := range *pullKills {
		pull()
		goal := int64(k+1)*share + sum
		m.until(t, fmt.Sprintf("kill %d", k), func() bool { return m.total >= goal || len(pulled) > 0 })
		if len(pulled) > 0 {
			t.Fatalf("the pull ended before kill %d: %v", k, <-pulled)
		}
		if err := d.Kill(); err != nil {
			t.Fatal(err)
		}
		<-pulled
		m.until(t, "the end of all requests", func() bool { return m.active == 0 })
		if err := d.Start(); err != nil {
			t.Fatal(err)
		}
		for i, have := range n.offsets(t, d) {
			again := m.of(n.layers[i].Digest.String()) - have - lost[i]
			lost[i] += again
			sum += again
			if worst = max(worst, again); again > most || again < 0 {
				t.Errorf("kill %d: %d bytes of layer %d (%d, of %d) are fetched again", k, again, i, have, n.layers[i].Size)
			}
		}
	}
	pull()
	if err := <-pulled; err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	n.whole(t, d)
	for i, l := range n.layers {
		if got := m.of(l.Digest.String()); got != l.Size+lost[i] {
			t.Errorf("%d bytes of layer %d came, it has %d, and %d were lost", got, i, l.Size, lost[i])
		}
	}
	leases, err := leasesapi.NewLeasesClient(must(d.Conn())).List(d.Context(context.Background()), &leasesapi.ListRequest{})
	if err != nil || len(leases.Leases) > 0 {
		t.Errorf("leases: %v, %v", leases.GetLeases(), err)
	}
	t.Logf("%d MiB, %d kills: %d bytes fetched again in all, at most %d of a layer at a kill; %s", *pullSize, *pullKills, sum, worst, took.Round(time.Millisecond))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestMctlPullKilled: when the daemon is killed or stopped, mctl waits for the next one, and has it go on.
func TestMctlPullKilled(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	m := newMeter(t, registry.URL(), 10<<20)
	for i, c := range []struct {
		name string
		end  func(*harness.Daemon) error
	}{{"killed", (*harness.Daemon).Kill}, {"stopped", (*harness.Daemon).Stop}} {
		t.Run(c.name, func(t *testing.T) {
			n := makeNoise(t, registry.URL(), c.name, byte(5+i), 12<<20, 1<<20)
			n.ref = m.addr + "/" + c.name + ":latest"
			d := harness.Test(t, bin)
			before := m.of("")
			pulled := make(chan error, 1)
			go func() {
				_, err := harness.Output(d.Mctl("images", "pull", "--plain-http", n.ref))
				pulled <- err
			}()
			m.until(t, "half of it", func() bool { return m.total-before > 6<<20 || len(pulled) > 0 })
			if err := c.end(d); err != nil {
				t.Fatal(err)
			}
			m.until(t, "the end of all requests", func() bool { return m.active == 0 })
			if err := d.Start(); err != nil {
				t.Fatal(err)
			}
			if err := <-pulled; err != nil {
				t.Fatal(err)
			}
			n.whole(t, d)
			if came, all := m.of("")-before, n.layers[0].Size+n.layers[1].Size; came > all+(2<<20) {
				t.Errorf("%d bytes came, of %d", came, all)
			}
		})
	}
}

// TestPullRegistryKilled: a registry that is killed and started again is gone on with, by this pull or by the next one.
func TestPullRegistryKilled(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	m := newMeter(t, registry.URL(), 10<<20)
	n := makeNoise(t, registry.URL(), "noise", 6, 12<<20, 1<<20)
	n.ref = m.addr + "/noise:latest"
	d := harness.Test(t, bin)
	pulled := make(chan error, 1)
	mv := newMover(t, d)
	pull := func() {
		_, err := mv.move(plain(n.ref), stored(n.ref))
		pulled <- err
	}
	go pull()
	m.until(t, "half of it", func() bool { return m.total > 6<<20 || len(pulled) > 0 })
	registry.Stop()
	m.until(t, "the end of all requests", func() bool { return m.active == 0 })
	registry.Run(t)
	if err := <-pulled; err != nil {
		if code(err) != "Unavailable" {
			t.Error(err)
		}
		pull()
		if err := <-pulled; err != nil {
			t.Fatal(err)
		}
	}
	n.whole(t, d)
	if came, all := m.of(""), n.layers[0].Size+n.layers[1].Size; came > all+(2<<20) {
		t.Errorf("%d bytes came, of %d", came, all)
	}
}
