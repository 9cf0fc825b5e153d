package content

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
)

func (e *env) write(w *Writer, data string) {
	e.t.Helper()
	if _, err := io.WriteString(w, data); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) writer(ctx context.Context, ref string, d digest.Digest, total int64) *Writer {
	e.t.Helper()
	w, err := e.Writer(ctx, ref, d, total)
	if err != nil {
		e.t.Fatal(err)
	}
	return w
}

func TestResume(t *testing.T) {
	for _, d := range []digest.Digest{"", digest.FromString("hello, world"), digest.SHA512.FromString("hello, world")} {
		t.Run(fmt.Sprintf("%.6s", d), func(t *testing.T) {
			ctx, e := newEnv(t, Shared)
			w := e.writer(ctx, "layer-1", d, 12)
			e.write(w, "hello, ")
			started := w.Status().StartedAt
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			e.restart()
			if st, err := e.Status(ctx, "layer-1"); err != nil || st.Offset != 7 || st.Total != 12 || st.Expected != d || !st.StartedAt.Equal(started) || st.UpdatedAt.IsZero() {
				t.Errorf("%+v, %v", st, err)
			}
			if d != "" {
				_, err := e.Writer(ctx, "layer-1", digest.FromString("other"), 0)
				if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), d.String()) {
					t.Errorf("for another digest: %v", err)
				}
			}
			if _, err := e.Writer(ctx, "layer-1", "", 13); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "12 bytes") {
				t.Errorf("for another size: %v", err)
			}
			w = e.writer(ctx, "layer-1", "", 0)
			if st := w.Status(); st.Offset != 7 || st.Total != 12 {
				t.Errorf("%+v", st)
			}
			e.write(w, "world")
			if err := errors.Join(w.Commit(ctx, 12, "", nil), w.Close()); err != nil {
				t.Fatal(err)
			}
			if d == "" {
				d = digest.FromString("hello, world")
			}
			e.restart()
			if got := e.read(ctx, d); got != "hello, world" {
				t.Errorf("%q", got)
			}
		})
	}
}

// TestWrongDigest: what is not what it was to be is not there for the next writer to go on from.
func TestWrongDigest(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	for _, c := range []struct {
		total int64 // in bytes; of 5, the last is still to come
		left  int
	}{{0, 0}, {4, 0}, {5, 1}} {
		w := e.writer(ctx, fmt.Sprint("r", c.total), digest.FromString("other"), c.total)
		e.write(w, "data")
		if err := w.Commit(ctx, 0, "", nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%v", err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if blobs, ingests := e.files(); len(blobs) != 0 || len(ingests) != c.left {
			t.Errorf("of %d bytes: %v, %v", c.total, blobs, ingests)
		}
	}
}

func TestCommitRefuses(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	e.add(ctx, "there", nil)
	right := digest.FromString("data")
	w := e.writer(ctx, "r", "", 0)
	e.write(w, "data")
	for says, err := range map[string]error{
		"it has 4 bytes, expected are 5": w.Commit(ctx, 5, "", nil), "expected is " + digest.FromString("x").String(): w.Commit(ctx, 4, digest.FromString("x"), nil),
	} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), `"r"`) {
			t.Errorf("%s: %v", says, err)
		}
	}
	if err := w.Commit(ctx, 4, right, map[string]string{"k": strings.Repeat("v", 5000)}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("label: %v", err)
	}
	if err := w.Truncate(2); !errdefs.IsNotImplemented(err) {
		t.Errorf("truncate: %v", err)
	}
	if blobs, ingests := e.files(); len(blobs) != 1 || len(ingests) != 1 {
		t.Errorf("%v, %v", blobs, ingests)
	}
	// All that is forgiven when it is set right.
	if err := w.Truncate(0); err != nil {
		t.Fatal(err)
	}
	e.write(w, "data")
	if err := w.Commit(ctx, 4, right, nil); err != nil {
		t.Fatal(err)
	}
	_, werr := io.WriteString(w, "more")
	for verb, err := range map[string]error{"write": werr, "commit": w.Commit(ctx, 0, "", nil), "truncate": w.Truncate(0)} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"r" is committed`) {
			t.Errorf("%s after the commit: %v", verb, err)
		}
	}
	if err := errors.Join(w.Close(), w.Close()); err != nil {
		t.Error(err)
	}
	if got := e.read(ctx, right); got != "data" {
		t.Errorf("%q", got)
	}
	w = e.writer(ctx, "r", "", 0)
	e.write(w, "there")
	if err := w.Commit(ctx, 0, "", nil); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), digest.FromString("there").String()) {
		t.Error(err)
	}
	_ = w.Close()
	if _, err := e.Status(ctx, "r"); !errdefs.IsNotFound(err) {
		t.Errorf("its ingest: %v", err)
	}
	for name, c := range map[string]struct {
		ref   string
		d     digest.Digest
		total int64
	}{"no ref": {"", "", 0}, "NUL": {"a\x00b", "", 0}, "negative": {"a", "", -1}, "digest": {"a", "sha256:x", 0}} {
		if _, err := e.Writer(ctx, c.ref, c.d, c.total); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTwoWriters(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	w := e.writer(ctx, "r", "", 0)
	if _, err := e.Writer(ctx, "r", "", 0); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), `"r"`) {
		t.Errorf("the same ref: %v", err)
	}
	two := e.writer(namespaces.With(ctx, "two"), "r", "", 0) // its own
	e.write(w, "one")
	e.write(two, "twoo")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w = e.writer(ctx, "r", "", 0)
	if w.Status().Offset != 3 {
		t.Errorf("%+v", w.Status())
	}
	// Two refs of the same content: the second finds it there.
	again := e.writer(ctx, "again", "", 0)
	e.write(again, "one")
	if err := w.Commit(ctx, 0, "", nil); err != nil {
		t.Error(err)
	}
	if err := again.Commit(ctx, 0, "", nil); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	for _, w := range []*Writer{w, two, again} {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if len(e.writers) != 0 {
		t.Errorf("%v", e.writers)
	}
}

func TestAbortAndList(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	var open []*Writer
	for _, ref := range []string{"b/1", "a-2", `q"x`} {
		w := e.writer(ctx, ref, "", 9)
		e.write(w, ref)
		open = append(open, w)
	}
	if err := e.writer(namespaces.With(ctx, "on"), "e", "", 0).Close(); err != nil { // a prefix of the other namespace
		t.Fatal(err)
	}
	for filter, want := range map[string]string{"": `a-2 b/1 q"x`, "ref==a-2": "a-2", "ref~=^b": "b/1", `ref=="q\"x"`: `q"x`, "ref==x": "", "other": ""} {
		f, err := filters.Parse(filter)
		if err != nil {
			t.Fatal(err)
		}
		all, err := e.ListStatuses(ctx, f)
		var got []string
		for _, st := range all {
			got = append(got, st.Ref)
			if st.Offset != int64(len(st.Ref)) || st.Total != 9 {
				t.Errorf("%+v", st)
			}
		}
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %v, %v", filter, got, err)
		}
	}
	_, st := e.Status(ctx, "e")
	for verb, err := range map[string]error{"abort": e.Abort(ctx, "e"), "status": st} {
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"e"`) {
			t.Errorf("%s of another namespace's: %v", verb, err)
		}
	}
	w := open[0]
	if err := e.Abort(ctx, "b/1"); err != nil { // under its hands
		t.Fatal(err)
	}
	_, werr := io.WriteString(w, "x")
	for verb, err := range map[string]error{"write": werr, "commit": w.Commit(ctx, 0, "", nil), "truncate": w.Truncate(0)} {
		if !errdefs.IsAborted(err) || !strings.Contains(err.Error(), `"b/1"`) {
			t.Errorf("%s after the abort: %v", verb, err)
		}
	}
	if err := e.Abort(ctx, "b/1"); !errdefs.IsNotFound(err) {
		t.Errorf("again: %v", err)
	}
	for _, w := range open {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if w := e.writer(ctx, "b/1", "", 0); w.Status().Offset != 0 {
		t.Errorf("what was aborted came back: %+v", w.Status())
	}
	if blobs, ingests := e.files(); len(blobs) != 0 || len(ingests) != 4 {
		t.Errorf("%v, %v", blobs, ingests)
	}
}

// TestSweep: at the start, what an interrupted daemon left between two steps is gone, and all else is kept.
func TestSweep(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	d := e.add(ctx, "good", nil)
	e.write(e.writer(ctx, "half", "", 0), "ha")
	lost := digest.FromString("no record")
	if err := os.WriteFile(e.path(lost), []byte("no record"), 0o444); err != nil {
		t.Fatal(err)
	}
	for name, files := range map[string][]string{"begun": {"total"}, "renamed": {"ref", "total", "expected"}, "empty": nil} {
		dir := filepath.Join(e.own().ingests(), name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if err := os.WriteFile(filepath.Join(dir, f), []byte("one\x00x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	e.restart()
	blobs, ingests := e.files()
	if len(blobs) != 1 || blobs[0] != e.path(d) || len(ingests) != 1 || ingests[0] != e.own().ingest("one", "half") {
		t.Errorf("%v, %v", blobs, ingests)
	}
	// Notes beside the data that make no sense are as if they were not there.
	for _, f := range []string{"expected", "total", "startedat"} {
		if err := os.WriteFile(filepath.Join(e.own().ingest("one", "half"), f), []byte("sha1:x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if st := e.writer(ctx, "half", "", 0).Status(); st.Offset != 2 || st.Expected != "" || st.Total != 0 {
		t.Errorf("%+v", st)
	}
	if err := os.Remove(e.path(d)); err != nil {
		t.Fatal(err)
	}
	if _, err := e.ReaderAt(ctx, d); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), d.String()) {
		t.Errorf("no file: %v", err)
	}
}

const writerEnv = "CONTENT_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerEnv); dir != "" {
		if err := writeForever(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// blobOf is the n-th blob of the writer that is killed.
func blobOf(n int) string { return strings.Repeat(fmt.Sprintf("blob %d\n", n), 2000) }

// writeForever commits blob after blob, in small pieces, and tells each; it goes on where the one before it was killed.
func writeForever(dir string) error {
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	if err != nil {
		return err
	}
	s, err := New(dir, Shared, db, &told{})
	if err != nil {
		return err
	}
	ctx := namespaces.With(context.Background(), "one")
	for n := 0; ; n++ {
		data := blobOf(n)
		w, err := s.Writer(ctx, fmt.Sprint("ref", n), digest.FromString(data), int64(len(data)))
		if errdefs.IsAlreadyExists(err) {
			continue
		}
		if err != nil {
			return err
		}
		for at := int(w.Status().Offset); at < len(data); at += 1000 {
			if _, err := io.WriteString(w, data[at:min(at+1000, len(data))]); err != nil {
				return err
			}
		}
		if err := errors.Join(w.Commit(ctx, 0, "", nil), w.Close()); err != nil {
			return err
		}
		fmt.Println(n)
	}
}

// TestKilled: whatever is committed when the daemon is killed is there and whole, and what was being written goes on.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	done := 0
	for round := range 8 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), writerEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		limit := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		s := bufio.NewScanner(out)
		for want := 3 + round; s.Scan(); want-- {
			if _, err := fmt.Sscan(s.Text(), &done); err != nil {
				t.Fatal(err)
			}
			if want == 0 { // a moment later, somewhere in the next blob
				time.AfterFunc(time.Duration(round)*700*time.Microsecond, func() { _ = cmd.Process.Kill() })
			}
		}
		limit.Stop()
		if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("the writer was not killed: %v", err)
		}
		db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
		if err != nil {
			t.Fatal(err)
		}
		store, err := New(dir, Shared, db, &told{})
		if err != nil {
			t.Fatal(err)
		}
		e := &env{t: t, dir: dir, db: db, Store: store}
		ctx := namespaces.With(context.Background(), "one")
		for n := range done + 1 {
			if got := e.read(ctx, digest.FromString(blobOf(n))); got != blobOf(n) {
				t.Errorf("blob %d is damaged", n)
			}
		}
		blobs, ingests := e.files()
		if len(blobs) < done+1 || len(blobs) > done+2 || len(ingests) > 1 {
			t.Errorf("%d committed: %d blobs, ingests %v", done+1, len(blobs), ingests)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// collecting is the context of the lease "l" in which, when somebody first looks whether there is a lease, a collection
// happens: between the look at a blob and what is written about it.
type collecting struct {
	context.Context
	collect func()
}

func (c collecting) Value(key any) any {
	v := c.Context.Value(key)
	if v == "l" {
		c.collect()
	}
	return v
}

// TestCollectedMeanwhile: what is collected after it was found is not there, and has no record without a file.
func TestCollectedMeanwhile(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	l := leases.NewStore(e.db)
	if _, err := l.Create(ctx, "l", nil); err != nil {
		t.Fatal(err)
	}
	leased := leases.With(ctx, "l")
	d := digest.FromString("garbage")
	collected := func(do func(ctx context.Context)) {
		t.Helper()
		e.add(ctx, "garbage", nil)
		happened := false
		do(collecting{leased, sync.OnceFunc(func() {
			happened = true
			err := e.db.Update(func(tx *metadata.Tx) error { return Forget(tx, "one", d) })
			if err := errors.Join(err, e.Free(d)); err != nil {
				t.Error(err)
			}
		})})
		if !happened {
			t.Error("nothing was collected")
		}
	}

	collected(func(ctx context.Context) {
		if err := e.Keep(ctx, d); !errdefs.IsNotFound(err) {
			t.Errorf("kept: %v", err)
		}
	})
	collected(func(ctx context.Context) {
		w, err := e.Writer(ctx, "r", d, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.Info(ctx, d); !errdefs.IsNotFound(err) {
		t.Errorf("it has a record: %v", err)
	}
	w := e.writer(leased, "w", "", 0)
	e.write(w, "garbage")
	collected(func(ctx context.Context) {
		if err := errors.Join(w.Commit(ctx, 0, d, nil), w.Close()); err != nil {
			t.Error(err)
		}
	})
	if got := e.read(ctx, d); got != "garbage" {
		t.Errorf("%q", got)
	}
	held, err := l.ListResources(ctx, "l")
	if err != nil || !slices.Contains(held, leases.Resource{ID: d.String(), Type: leases.Content}) {
		t.Errorf("the lease keeps %v, %v", held, err)
	}
}

// TestLost: what has a record and no bytes, or not all of them, is written again by whoever wants it, in any namespace.
func TestLost(t *testing.T) {
	const data = "lost and found"
	for what, lose := range map[string]func(path string) error{
		"gone": os.Remove,
		"cut":  func(path string) error { return os.Truncate(path, 3) },
	} {
		t.Run(what, func(t *testing.T) {
			ctx, e := newEnv(t, Shared)
			d := e.add(ctx, data, map[string]string{"of": "the first"})
			path := e.backend.(*files).path(d)
			for _, again := range []context.Context{ctx, namespaces.With(ctx, "two")} {
				if err := lose(path); err != nil {
					t.Fatal(err)
				}
				if err := e.Keep(again, d); !errdefs.IsNotFound(err) {
					t.Errorf("kept: %v", err)
				}
				w, err := e.Writer(again, "again", d, int64(len(data)))
				if err != nil {
					t.Fatal(err)
				}
				e.write(w, data)
				if err := errors.Join(w.Commit(again, 0, d, nil), w.Close()); err != nil {
					t.Fatal(err)
				}
				if got := e.read(again, d); got != data {
					t.Errorf("%q", got)
				}
				if err := e.Keep(again, d); err != nil {
					t.Error(err)
				}
			}
			if i, err := e.Info(ctx, d); err != nil || i.Labels["of"] != "the first" {
				t.Errorf("its labels are %v, %v", i.Labels, err)
			}
		})
	}
}
