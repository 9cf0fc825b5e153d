package content

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
)

// told notes the topics that are published.
type told struct {
	mu     sync.Mutex
	topics []string
}

func (e *told) Publish(ctx context.Context, topic string, _ proto.Message) error {
	if _, err := namespaces.Required(ctx); err != nil { // as the true one
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.topics = append(e.topics, topic)
	return nil
}

// env is a store that can be closed and opened again.
type env struct {
	t      *testing.T
	dir    string
	policy string
	db     *metadata.DB
	events *told
	*Store
}

func newEnv(t *testing.T, policy string) (context.Context, *env) {
	t.Helper()
	e := &env{t: t, dir: t.TempDir(), policy: policy}
	e.open()
	t.Cleanup(func() { _ = e.db.Close() })
	return namespaces.With(context.Background(), "one"), e
}

func (e *env) open() {
	e.t.Helper()
	var err error
	if e.db, err = metadata.Open(filepath.Join(e.dir, "metadata.db")); err != nil {
		e.t.Fatal(err)
	}
	e.events = &told{}
	if e.Store, err = New(e.dir, e.policy, e.db, e.events); err != nil {
		e.t.Fatal(err)
	}
}

// restart is what a daemon does that was stopped and started.
func (e *env) restart() {
	e.t.Helper()
	if err := e.db.Close(); err != nil {
		e.t.Fatal(err)
	}
	e.open()
}

// add commits data under its own reference.
func (e *env) add(ctx context.Context, data string, labels map[string]string) digest.Digest {
	e.t.Helper()
	d := digest.FromString(data)
	w, err := e.Writer(ctx, "add-"+data, "", 0)
	if err != nil {
		e.t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	if _, err := io.WriteString(w, data); err != nil {
		e.t.Fatal(err)
	}
	if err := w.Commit(ctx, int64(len(data)), d, labels); err != nil {
		e.t.Fatal(err)
	}
	return d
}

func (e *env) read(ctx context.Context, d digest.Digest) string {
	e.t.Helper()
	r, err := e.ReaderAt(ctx, d)
	if err != nil {
		e.t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	data, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	if err != nil {
		e.t.Fatal(err)
	}
	return string(data)
}

func (e *env) own() *files { return e.backend.(*files) }

// path is a blob's file.
func (e *env) path(d digest.Digest) string { return e.own().path(d) }

// files lists what is below the store, without directories of algorithms.
func (e *env) files() (blobs, ingests []string) {
	e.t.Helper()
	blobs, _ = filepath.Glob(filepath.Join(e.dir, Dir, "blobs", "*", "*"))
	ingests, _ = filepath.Glob(filepath.Join(e.dir, Dir, "ingest", "*"))
	return blobs, ingests
}

func TestBlobs(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	d := e.add(ctx, "hello", map[string]string{"a.b": "1", "c": "2"})
	i, err := e.Info(ctx, d)
	if err != nil || i.Size != 5 || i.CreatedAt.IsZero() || i.Labels["a.b"] != "1" || e.read(ctx, d) != "hello" {
		t.Errorf("%v, %v", i, err)
	}
	if fi, err := os.Stat(e.path(d)); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("%v, %v", fi, err)
	}
	if _, left := e.files(); len(left) != 0 {
		t.Errorf("the ingest is still there: %v", left)
	}
	if err := e.Delete(ctx, d); err != nil {
		t.Fatal(err)
	}
	if blobs, _ := e.files(); len(blobs) != 0 {
		t.Errorf("the file is still there: %v", blobs)
	}
	if want := []string{"/content/create", "/content/delete"}; !reflect.DeepEqual(e.events.topics, want) {
		t.Errorf("published %v, not %v", e.events.topics, want)
	}
	for _, c := range []struct {
		d  digest.Digest
		is func(error) bool
	}{{d, errdefs.IsNotFound}, {"", errdefs.IsInvalidArgument}, {"sha256:../../../x", errdefs.IsInvalidArgument}, {"sha256:ab", errdefs.IsInvalidArgument}, {"md5:ab", errdefs.IsInvalidArgument}} {
		_, ierr := e.Info(ctx, c.d)
		_, uerr := e.Update(ctx, Info{Digest: c.d})
		_, rerr := e.ReaderAt(ctx, c.d)
		for verb, err := range map[string]error{"info": ierr, "update": uerr, "read": rerr, "delete": e.Delete(ctx, c.d)} {
			if !c.is(err) || !strings.Contains(err.Error(), c.d.String()) {
				t.Errorf("%s of %q: %v", verb, c.d, err)
			}
		}
	}
	if _, err := New(t.TempDir(), "some", e.db, e.events); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `"some"`) {
		t.Errorf("unknown policy: %v", err)
	}
}

func TestUpdateAndWalk(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	d := e.add(ctx, "x", map[string]string{"l": "old", "gone": "1"})
	for _, c := range []struct {
		paths []string
		set   map[string]string
		want  map[string]string // nil: refused
	}{
		{[]string{"labels.l", "labels.gone"}, map[string]string{"l": "new", "z": "9"}, map[string]string{"l": "new"}},
		{[]string{"labels.a.b/c"}, map[string]string{"a.b/c": "1"}, map[string]string{"l": "new", "a.b/c": "1"}},
		{[]string{"size"}, nil, nil}, {[]string{"labels.l", "digest"}, map[string]string{"l": "no"}, nil}, {[]string{""}, nil, nil},
		{nil, map[string]string{"k": strings.Repeat("v", 5000)}, nil},
		{[]string{"labels"}, map[string]string{"n": "1"}, map[string]string{"n": "1"}},
		{nil, map[string]string{"containerd.io/gc.root": "now"}, map[string]string{"containerd.io/gc.root": "now"}},
	} {
		before, _ := e.Info(ctx, d)
		out, err := e.Update(ctx, Info{Digest: d, Labels: c.set, Size: 99}, c.paths...)
		got, gerr := e.Info(ctx, d)
		if gerr != nil {
			t.Fatal(gerr)
		}
		if c.want == nil {
			if !errdefs.IsInvalidArgument(err) || !reflect.DeepEqual(got, before) {
				t.Errorf("%q: %v, %v", c.paths, got, err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got.Labels, c.want) || !reflect.DeepEqual(out, got) || got.Size != 1 {
			t.Errorf("%q: %+v, answered %+v, %v", c.paths, got, out, err)
		}
	}
	e.add(ctx, "yy", nil)
	for filter, want := range map[string]int{
		"": 2, "digest==" + d.String(): 1, `labels."containerd.io/gc.root"`: 1, "size==2": 1, "labels.x": 0, "digest~=^sha256:": 2, "ref": 0,
	} {
		f, err := filters.Parse(filter)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		if err := e.Walk(ctx, f, func(Info) error { n++; return nil }); err != nil || n != want {
			t.Errorf("%q: %d, %v", filter, n, err)
		}
	}
	enough := errors.New("enough")
	if err := e.Walk(ctx, filters.Always, func(Info) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}

// TestSharing: what one namespace has, others see only once they name its digest, as the policy has it; the file goes
// with the last of them.
func TestSharing(t *testing.T) {
	for _, c := range []struct {
		policy, label string
		shared        bool
	}{{Shared, "", true}, {Isolated, "", false}, {Isolated, "false", false}, {Isolated, "true", true}} {
		t.Run(c.policy+c.label, func(t *testing.T) {
			ctx, e := newEnv(t, c.policy)
			if err := metadata.NewNamespaces(e.db).Create("one", map[string]string{ShareableLabel: c.label}); err != nil {
				t.Fatal(err)
			}
			d := e.add(ctx, "data", map[string]string{"secret": "1"})
			two := namespaces.With(ctx, "two")
			if _, err := e.Info(two, d); !errdefs.IsNotFound(err) {
				t.Errorf("info: %v", err)
			}
			if err := e.Delete(two, d); !errdefs.IsNotFound(err) {
				t.Errorf("delete: %v", err)
			}
			w, err := e.Writer(two, "ref", d, 4)
			if c.shared {
				if !errdefs.IsAlreadyExists(err) || w != nil {
					t.Fatalf("%v", err)
				}
			} else {
				if err != nil {
					t.Fatal(err)
				}
				if err := w.Commit(two, 0, "", nil); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("without the data: %v", err)
				}
				if _, err := io.WriteString(w, "data"); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(w.Commit(two, 0, "", nil), w.Close()); err != nil {
					t.Fatal(err)
				}
			}
			if i, err := e.Info(two, d); err != nil || i.Size != 4 || len(i.Labels) != 0 {
				t.Errorf("%v, %v", i, err)
			}
			if err := e.Delete(ctx, d); err != nil {
				t.Fatal(err)
			}
			if got := e.read(two, d); got != "data" {
				t.Errorf("%q", got)
			}
			if err := e.Delete(two, d); err != nil {
				t.Fatal(err)
			}
			if blobs, _ := e.files(); len(blobs) != 0 {
				t.Errorf("%v", blobs)
			}
			if _, err := e.Writer(two, "gone", d, 0); err != nil { // nobody has it any more
				t.Error(err)
			}
		})
	}
}

// TestLeased: a lease keeps the ingest that is made under it, then its blob; also one that was there before.
func TestLeased(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	old := e.add(ctx, "old", nil)
	e.add(namespaces.With(ctx, "two"), "other", nil)
	l := leases.NewStore(e.db)
	if _, err := l.Create(ctx, "l", nil); err != nil {
		t.Fatal(err)
	}
	leased := leases.With(ctx, "l")
	kept := func(want ...leases.Resource) {
		t.Helper()
		if got, err := l.ListResources(ctx, "l"); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("it keeps %v, not %v: %v", got, want, err)
		}
		for _, r := range want {
			if err := l.DeleteResource(ctx, "l", r); err != nil {
				t.Error(err)
			}
		}
	}
	blob := func(d digest.Digest) leases.Resource { return leases.Resource{ID: d.String(), Type: leases.Content} }
	w, err := e.Writer(leased, "r", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := l.ListResources(ctx, "l"); err != nil || !reflect.DeepEqual(got, []leases.Resource{{ID: "r", Type: leases.Ingests}}) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := io.WriteString(w, "new"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Commit(leased, 0, "", nil), w.Close()); err != nil {
		t.Fatal(err)
	}
	kept(blob(digest.FromString("new")))
	for _, d := range []digest.Digest{old, digest.FromString("other")} { // here, and in another namespace
		if _, err := e.Writer(leased, "r", d, 0); !errdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
		kept(blob(d))
	}
	// Found out only at the end.
	if w, err = e.Writer(leased, "r", "", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "old"); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(leased, 0, "", nil); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	_ = w.Close()
	kept(blob(old))
	// A lease that there is not, from the beginning and from the middle on.
	if _, err := e.Writer(leases.With(ctx, "x"), "r", "", 0); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `lease "x"`) {
		t.Errorf("unknown lease: %v", err)
	}
	if w, err = e.Writer(leased, "r", "", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "late"); err != nil {
		t.Fatal(err)
	}
	if err := l.Delete(ctx, "l"); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(leased, 0, "", nil); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `lease "l"`) {
		t.Errorf("lease that is gone: %v", err)
	}
	_ = w.Close()
	if blobs, ingests := e.files(); len(blobs) != 3 || len(ingests) != 0 {
		t.Errorf("half-made: %v, %v", blobs, ingests)
	}
}
