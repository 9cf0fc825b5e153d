package gc

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/sandboxes"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
)

type labels = map[string]string

// env is a daemon's stores and their collector.
type env struct {
	t          testing.TB
	ctx        context.Context
	db         *metadata.DB
	content    *content.Store
	images     *images.Store
	containers *containers.Store
	leases     *leases.Store
	snapshots  *snapshots.Store
	*Collector

	mu     sync.Mutex
	topics []string
}

func (e *env) Publish(ctx context.Context, topic string, _ proto.Message) error {
	if _, err := namespaces.Required(ctx); err != nil { // as the true one
		return err
	}
	e.mu.Lock()
	e.topics = append(e.topics, topic)
	e.mu.Unlock()
	return nil
}

func newEnv(t testing.TB) *env {
	t.Helper()
	dir := t.TempDir()
	e := &env{t: t, ctx: namespaces.With(context.Background(), "one")}
	var err error
	e.db, err = metadata.Open(filepath.Join(dir, "metadata.db"))
	e.must(err)
	t.Cleanup(func() { _ = e.db.Close() })
	e.content, err = content.New(dir, content.Shared, e.db, e)
	e.must(err)
	backend, err := native.New(filepath.Join(dir, "native"))
	e.must(err)
	e.snapshots, err = snapshots.NewStore(e.ctx, e.db, e, map[string]snapshots.Backend{"native": backend})
	e.must(err)
	t.Cleanup(func() { _ = e.snapshots.Close() })
	e.images, e.containers, e.leases = images.NewStore(e.db), containers.NewStore(e.db), leases.NewStore(e.db)
	e.Collector = &Collector{DB: e.db, Content: e.content, Snapshots: e.snapshots, Events: e, Log: slog.New(slog.DiscardHandler)}
	return e
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// blob writes text and gives its digest.
func (e *env) blob(ctx context.Context, text string, l labels) digest.Digest {
	e.t.Helper()
	w, err := e.content.Writer(ctx, text, "", 0)
	e.must(err)
	_, err = w.Write([]byte(text))
	e.must(err)
	e.must(w.Commit(ctx, 0, "", l))
	e.must(w.Close())
	return digest.FromString(text)
}

func (e *env) image(name string, target digest.Digest, l labels) {
	e.t.Helper()
	_, err := e.images.Create(e.ctx, images.Image{Name: name, Labels: l, Target: ocispec.Descriptor{MediaType: "m", Digest: target, Size: 1}})
	e.must(err)
}

// snapshot makes a committed one, or with kind Active or View one of those.
func (e *env) snapshot(ctx context.Context, kind snapshots.Kind, key, parent string, l labels) {
	e.t.Helper()
	s, err := e.snapshots.Snapshotter("native")
	e.must(err)
	switch kind {
	case snapshots.Committed:
		_, err = s.Prepare(ctx, key+"-active", parent, nil)
		e.must(err)
		e.must(s.Commit(ctx, key, key+"-active", l))
	case snapshots.Active:
		_, err = s.Prepare(ctx, key, parent, l)
		e.must(err)
	case snapshots.View:
		_, err = s.View(ctx, key, parent, l)
		e.must(err)
	}
}

func (e *env) container(id, snapshot string, l labels) {
	e.t.Helper()
	_, err := e.containers.Create(e.ctx, containers.Container{
		ID: id, Labels: l, Runtime: containers.Runtime{Name: "r"}, Spec: &anypb.Any{TypeUrl: "x"}, Snapshotter: "native", SnapshotKey: snapshot,
	})
	e.must(err)
}

func (e *env) lease(id string, l labels, kept ...leases.Resource) context.Context {
	e.t.Helper()
	_, err := e.leases.Create(e.ctx, id, l)
	e.must(err)
	for _, r := range kept {
		e.must(e.leases.AddResource(e.ctx, id, r))
	}
	return leases.With(e.ctx, id)
}

func (e *env) collect() Result {
	e.t.Helper()
	res, err := e.Collect(e.ctx)
	e.must(err)
	return res
}

// left names what is there: image:NAME, lease:ID, snapshot:KEY, and content by the text given for its digest.
func (e *env) left(names map[digest.Digest]string) (out []string) {
	e.t.Helper()
	e.must(e.content.Walk(e.ctx, filters.Always, func(i content.Info) error {
		out = append(out, names[i.Digest])
		return nil
	}))
	all, err := e.images.List(e.ctx, filters.Always)
	e.must(err)
	for _, i := range all {
		out = append(out, "image:"+i.Name)
	}
	ls, err := e.leases.List(e.ctx, filters.Always)
	e.must(err)
	for _, l := range ls {
		out = append(out, "lease:"+l.ID)
	}
	s, err := e.snapshots.Snapshotter("native")
	e.must(err)
	e.must(s.Walk(e.ctx, filters.Always, func(i snapshots.Info) error {
		out = append(out, "snapshot:"+i.Name)
		return nil
	}))
	slices.Sort(out)
	return out
}

// TestLabels: every way in which something may be needed, and that the rest goes.
func TestLabels(t *testing.T) {
	past, future := time.Now().Add(-time.Minute).Format(time.RFC3339), time.Now().Add(time.Hour).Format(time.RFC3339)
	d := digest.FromString
	for name, c := range map[string]struct {
		make func(e *env)
		want string // what is left, in order; of content the texts
	}{
		"nothing needs it": {func(e *env) { e.blob(e.ctx, "a", nil); e.snapshot(e.ctx, snapshots.Active, "s", "", nil) }, ""},
		"root":             {func(e *env) { e.blob(e.ctx, "a", labels{labelRoot: ""}) }, "a"},
		"image and its tree": {func(e *env) {
			e.blob(e.ctx, "layer", nil)
			e.blob(e.ctx, "config", labels{labelRef + "snapshot.native": "top"})
			e.blob(e.ctx, "manifest", labels{labelRef + "content.config": d("config").String(), labelRef + "content.l.0": d("layer").String()})
			e.snapshot(e.ctx, snapshots.Committed, "base", "", nil)
			e.snapshot(e.ctx, snapshots.Committed, "top", "base", nil)
			e.snapshot(e.ctx, snapshots.Committed, "other", "base", nil)
			e.image("i", d("manifest"), nil)
		}, "config image:i layer manifest snapshot:base snapshot:top"},
		"labels of an image": {func(e *env) {
			e.blob(e.ctx, "a", nil)
			e.blob(e.ctx, "b", nil)
			e.image("i", d("gone"), labels{labelRef + "content": d("a").String(), labelRef + "contents": d("b").String()})
		}, "a image:i"},
		"container": {func(e *env) {
			e.blob(e.ctx, "a", nil)
			e.snapshot(e.ctx, snapshots.Committed, "base", "", nil)
			e.snapshot(e.ctx, snapshots.Active, "rw", "base", nil)
			e.snapshot(e.ctx, snapshots.View, "more", "", nil)
			e.container("c", "rw", labels{labelRef + "content.x": d("a").String(), labelRef + "snapshot.native/2": "more"})
		}, "a snapshot:base snapshot:more snapshot:rw"},
		"sandbox": {func(e *env) {
			e.blob(e.ctx, "a", nil)
			e.blob(e.ctx, "b", labels{labelBack + "sandbox": "pod"})
			_, err := sandboxes.NewStore(e.db).Create(e.ctx, sandboxes.Sandbox{ID: "pod", Labels: labels{labelRef + "content.x": d("a").String()}})
			e.must(err)
		}, "a b"},
		"snapshots refer": {func(e *env) {
			e.blob(e.ctx, "a", nil)
			e.snapshot(e.ctx, snapshots.Active, "s", "", labels{labelRoot: "x", labelRef + "content": d("a").String()})
		}, "a snapshot:s"},
		"back references": {func(e *env) {
			e.blob(e.ctx, "a", labels{labelBack + "image": "i"})
			e.blob(e.ctx, "b", labels{labelBack + "content.subject": d("a").String()})
			e.blob(e.ctx, "c", labels{labelBack + "container": "c"})
			e.blob(e.ctx, "d", labels{labelBack + "snapshot.native": "s"})
			e.blob(e.ctx, "e", labels{labelBack + "image": "other"})
			e.snapshot(e.ctx, snapshots.Active, "s", "", nil)
			e.container("c", "s", nil)
			e.image("i", d("gone"), nil)
		}, "a b c d image:i snapshot:s"},
		"lease": {func(e *env) {
			ctx := e.lease("l", labels{leases.ExpireLabel: future})
			e.blob(e.ctx, "b", nil)
			e.blob(ctx, "a", labels{labelRef + "content": d("b").String()})
			e.snapshot(ctx, snapshots.Active, "s", "", nil)
		}, "a b lease:l snapshot:s"},
		"lease that is over": {func(e *env) {
			ctx := e.lease("l", labels{leases.ExpireLabel: past})
			e.blob(ctx, "a", nil)
		}, ""},
		"lease without a time that can be read": {func(e *env) { e.blob(e.lease("l", labels{leases.ExpireLabel: "soon"}), "a", nil) }, "a lease:l"},
		"flat lease": {func(e *env) {
			e.blob(e.ctx, "b", nil)
			e.snapshot(e.ctx, snapshots.Committed, "base", "", labels{labelRef + "content": d("b").String()})
			ctx := e.lease("l", labels{leases.FlatLabel: "x"})
			e.blob(ctx, "a", labels{labelRef + "content": d("b").String()})
			e.snapshot(ctx, snapshots.Active, "s", "base", nil)
		}, "a lease:l snapshot:base snapshot:s"},
		"flat lease of what an image needs, too": {func(e *env) {
			e.blob(e.ctx, "b", nil)
			e.blob(e.lease("l", labels{leases.FlatLabel: "x"}), "a", labels{labelRef + "content": d("b").String()})
			e.image("i", d("a"), nil)
		}, "a b image:i lease:l"},
		"images end": {func(e *env) {
			for _, n := range []string{"a", "b", "c", "d"} {
				e.blob(e.ctx, n, nil)
			}
			e.image("over", d("a"), labels{leases.ExpireLabel: past})
			e.image("leased", d("b"), labels{leases.ExpireLabel: past})
			e.image("needed", d("c"), labels{leases.ExpireLabel: past})
			e.image("later", d("d"), labels{leases.ExpireLabel: future, labelRef + "image": "needed"})
			e.lease("l", nil, leases.Resource{ID: "leased", Type: leases.Images})
		}, "b c d image:later image:leased image:needed lease:l"},
		"circles": {func(e *env) {
			e.blob(e.ctx, "a", labels{labelRef + "content": d("b").String()})
			e.blob(e.ctx, "b", labels{labelRef + "content": d("a").String()})
			e.blob(e.ctx, "c", labels{labelRef + "content": d("c").String(), labelRoot: ""})
		}, "c"},
		"a deep chain of snapshots": {func(e *env) {
			parent := ""
			for i := range 30 {
				key := fmt.Sprint("s", i)
				e.snapshot(e.ctx, snapshots.Committed, key, parent, nil)
				parent = key
			}
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			c.make(e)
			names := map[digest.Digest]string{}
			for _, n := range []string{"a", "b", "c", "d", "e", "layer", "config", "manifest"} {
				names[d(n)] = n
			}
			res := e.collect()
			if got := strings.Join(e.left(names), " "); got != c.want {
				t.Errorf("left: %q, not %q", got, c.want)
			}
			// Files go with their records.
			for dg, n := range names {
				_, err := e.content.ReaderAt(e.ctx, dg)
				if err != nil && !errdefs.IsNotFound(err) {
					t.Errorf("%s: %v", n, err)
				}
			}
			if again := e.collect(); len(again.Removed) != 0 {
				t.Errorf("a second collection removed %v, after %v", again.Removed, res.Removed)
			}
		})
	}
}
