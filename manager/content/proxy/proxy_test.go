package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/content/proxy"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
)

// TestStore: what is written here is stored there, once for all namespaces, and gone when the last has removed it.
func TestStore(t *testing.T) {
	p := newThere(t)
	h := newHere(t, p, content.Shared, proxy.Options{})
	data := noise(3<<20 + 17)
	d, err := h.add(h.ctx, data)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.stored(d); len(got) != 1 || got[proxy.LabelOwner] != "me" {
		t.Errorf("stored there with %v", got)
	}
	if i, err := h.Info(h.ctx, d); err != nil || i.Size != int64(len(data)) || i.Labels["k"] != "v" || len(i.Labels) != 1 {
		t.Errorf("%+v, %v", i, err)
	}
	if got, err := h.read(h.ctx, d); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	r, err := h.ReaderAt(h.ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		off, n, want int64
		err          error
	}{{1 << 20, 5, 5, nil}, {0, 5, 5, nil}, {int64(len(data)) - 3, 5, 3, io.EOF}, {int64(len(data)), 1, 0, io.EOF}, {100, 2 << 20, 2 << 20, nil}} {
		buf := make([]byte, c.n)
		n, err := r.ReadAt(buf, c.off)
		if int64(n) != c.want || !errors.Is(err, c.err) || !bytes.Equal(buf[:n], data[c.off:c.off+int64(n)]) {
			t.Errorf("%d at %d: %d, %v", c.n, c.off, n, err)
		}
	}
	if _, err := r.ReadAt(make([]byte, 1), -1); !errdefs.IsOutOfRange(err) {
		t.Error(err)
	}
	two := namespaces.With(h.ctx, "two")
	if _, err := h.Info(two, d); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := h.add(two, data); !errdefs.IsAlreadyExists(err) { // by its digest alone
		t.Error(err)
	}
	if err := h.Delete(h.ctx, d); err != nil || p.stored(d) == nil {
		t.Errorf("%v; there: %v", err, p.stored(d))
	}
	if err := h.Delete(two, d); err != nil || p.stored(d) != nil {
		t.Errorf("%v; there: %v", err, p.stored(d))
	}
	if _, err := h.read(h.ctx, d); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if d, err = h.add(h.ctx, nil); err != nil { // an empty blob
		t.Error(err)
	}
	if got, err := h.read(h.ctx, d); err != nil || len(got) != 0 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestPolicies: what the program has already counts by its digest where content is shared, and must be written where it is
// isolated.
func TestPolicies(t *testing.T) {
	data := noise(1000)
	for _, policy := range []string{content.Shared, content.Isolated} {
		t.Run(policy, func(t *testing.T) {
			p := newThere(t)
			if _, err := (&here{Store: p.Store}).add(namespaces.With(context.Background(), "default"), data); err != nil {
				t.Fatal(err)
			}
			h := newHere(t, p, policy, proxy.Options{})
			d, err := h.add(h.ctx, data)
			if want := policy == content.Shared; errdefs.IsAlreadyExists(err) != want || !want && err != nil {
				t.Error(err)
			}
			if got, err := h.read(h.ctx, d); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if st, err := p.ListStatuses(namespaces.With(context.Background(), "default"), filters.Always); err != nil || len(st) > 0 {
				t.Errorf("ingests there: %+v, %v", st, err)
			}
		})
	}
}

// TestIngests: an ingest is listed in its namespace, goes on where it was, is begun anew, and is aborted.
func TestIngests(t *testing.T) {
	p := newThere(t)
	h := newHere(t, p, content.Shared, proxy.Options{})
	data := noise(500)
	d := digest.FromBytes(data)
	w, err := h.Writer(h.ctx, "r/1", "", 500)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Writer(h.ctx, "r/1", "", 500); !errors.Is(err, content.ErrBusy) {
		t.Error(err)
	}
	if _, err := w.Write(data[:200]); err != nil {
		t.Fatal(err)
	}
	if got := w.Digest(); got != digest.FromBytes(data[:200]) {
		t.Errorf("digest %s", got)
	}
	if err := w.Commit(h.ctx, 500, "", nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	st, err := h.ListStatuses(h.ctx, filters.Always)
	if err != nil || len(st) != 1 || st[0].Ref != "r/1" || st[0].Offset != 200 || st[0].Total != 500 {
		t.Errorf("%+v, %v", st, err)
	}
	if st, err := h.ListStatuses(namespaces.With(h.ctx, "two"), filters.Always); err != nil || len(st) > 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if w, err = h.Writer(h.ctx, "r/1", "", 0); err != nil {
		t.Fatal(err)
	}
	if s := w.Status(); s.Offset != 200 || s.Ref != "r/1" {
		t.Errorf("%+v", s)
	}
	if got := w.Digest(); got != digest.FromBytes(data[:200]) {
		t.Errorf("digest of what another wrote: %s", got)
	}
	if _, err := w.Write(data[200:]); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(h.ctx, 0, digest.FromString("other"), nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if err := w.Truncate(0); err != nil || w.Status().Offset != 0 {
		t.Errorf("%v, %+v", err, w.Status())
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Commit(h.ctx, 500, d, nil), w.Close()); err != nil {
		t.Fatal(err)
	}
	if got, err := h.read(h.ctx, d); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}

	if w, err = h.Writer(h.ctx, "r/2", "", 0); err != nil {
		t.Fatal(err)
	}
	if err := h.Abort(h.ctx, "r/2"); err != nil {
		t.Error(err)
	}
	if _, err := w.Write(data); !errdefs.IsAborted(err) {
		t.Error(err)
	}
	_ = w.Close()
	if err := h.Abort(h.ctx, "r/2"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := h.Status(h.ctx, "r/2"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// TestPartial: a download is written in its order, and goes on where it was.
func TestPartial(t *testing.T) {
	p := newThere(t)
	h := newHere(t, p, content.Shared, proxy.Options{})
	data := noise(300)
	d := digest.FromBytes(data)
	open := func() content.Partial {
		t.Helper()
		part, err := h.Partial(h.ctx, "r", d, 300, 100)
		if err != nil {
			t.Fatal(err)
		}
		return part
	}
	part := open()
	if m := part.Missing(); len(m) != 1 || m[0] != (content.Part{End: 300}) || part.Total() != 300 {
		t.Errorf("%+v", m)
	}
	if _, err := part.WriteAt(data[100:], 100); !errdefs.IsOutOfRange(err) {
		t.Error(err)
	}
	if n, err := part.WriteAt(data[:120], 0); n != 120 || err != nil {
		t.Error(n, err)
	}
	if _, err := part.Open(h.ctx); !errdefs.IsNotImplemented(err) {
		t.Error(err)
	}
	if err := part.Commit(h.ctx, nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	_ = part.Close()
	part = open()
	if m := part.Missing(); len(m) != 1 || m[0].Next != 120 || part.Written() != 120 {
		t.Errorf("%+v", m)
	}
	if _, err := part.WriteAt(data[120:], 120); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(part.Commit(h.ctx, map[string]string{"k": "v"}), part.Close()); err != nil {
		t.Fatal(err)
	}
	if got, err := h.read(h.ctx, d); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestRestarted: the program is ended at every answer to a write, and at that to the commit, and started again. Nobody
// notices, and no byte is written twice.
func TestRestarted(t *testing.T) {
	data := noise(1 << 20)
	for k := range int64(12) {
		p := newThere(t)
		h := newHere(t, p, content.Shared, proxy.Options{})
		p.breakOff.Store(k + 1)
		d, err := h.add(h.ctx, data) // 11 writes and a commit
		if err != nil {
			t.Fatalf("ended at answer %d: %v", k, err)
		}
		if p.breakOff.Load() != 0 {
			t.Fatalf("there are less than %d answers", k)
		}
		if got, err := h.read(h.ctx, d); err != nil || !bytes.Equal(got, data) {
			t.Errorf("ended at answer %d: %d bytes, %v", k, len(got), err)
		}
		if st, err := h.ListStatuses(h.ctx, filters.Always); err != nil || len(st) > 0 {
			t.Errorf("ended at answer %d: ingests %+v, %v", k, st, err)
		}
	}
}

// TestAway: without the program, what needs it fails by Unavailable with its name and address, and the rest works.
func TestAway(t *testing.T) {
	p := newThere(t)
	h := newHere(t, p, content.Shared, proxy.Options{Back: 300 * time.Millisecond})
	data := noise(1000)
	d, err := h.add(h.ctx, data)
	if err != nil {
		t.Fatal(err)
	}
	r, err := h.ReaderAt(h.ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	w, err := h.Writer(h.ctx, "open", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	p.stop()
	away := func(what string, err error) {
		t.Helper()
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "outside at "+p.socket) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = r.ReadAt(make([]byte, 1), 0)
	away("read", err)
	_, err = w.Write(data)
	away("write", err)
	_ = w.Close()
	_, err = h.Writer(h.ctx, "new", "", 0)
	away("a new write", err)
	_, err = h.add(h.ctx, noise(7))
	away("a new write of a digest", err)
	_, err = h.Status(h.ctx, "open")
	away("status", err)
	_, err = h.ListStatuses(h.ctx, filters.Always)
	away("statuses", err)
	away("abort", h.Abort(h.ctx, "open"))
	_, err = h.Unknown(h.ctx)
	away("unknown", err)
	away("tidy", h.Tidy(h.ctx))
	if err := h.b.Trouble(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), p.socket) {
		t.Error(err)
	}
	if i, err := h.Info(h.ctx, d); err != nil || i.Size != 1000 {
		t.Errorf("%+v, %v", i, err)
	}
	if err := h.Walk(h.ctx, filters.Always, func(content.Info) error { return nil }); err != nil {
		t.Error(err)
	}
	if err := h.Delete(h.ctx, d); err != nil { // its record is gone
		t.Error(err)
	}
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	if err := h.b.Trouble(); err != nil {
		t.Error(err)
	}
	if p.stored(d) == nil {
		t.Error("it was removed by nobody")
	}
	if err := h.Tidy(h.ctx); err != nil || p.stored(d) != nil {
		t.Errorf("%v; there: %v", err, p.stored(d))
	}
}

// TestTidy: nothing is removed that this daemon did not store, or that has a record.
func TestTidy(t *testing.T) {
	p := newThere(t)
	h := newHere(t, p, content.Shared, proxy.Options{})
	theirs, err := (&here{Store: p.Store}).add(namespaces.With(context.Background(), "default"), noise(10))
	if err != nil {
		t.Fatal(err)
	}
	ours, err := h.add(h.ctx, noise(20))
	if err != nil {
		t.Fatal(err)
	}
	p.forget = true
	plain, err := h.add(h.ctx, noise(30))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Tidy(h.ctx); err != nil {
		t.Fatal(err)
	}
	for what, d := range map[string]digest.Digest{"theirs": theirs, "ours": ours, "ours without a label": plain} {
		if p.stored(d) == nil {
			t.Errorf("%s was removed", what)
		}
	}
	if all, err := h.Unknown(h.ctx); err != nil || len(all) != 1 || all[0] != theirs {
		t.Errorf("%v, %v", all, err)
	}
	if err := p.Delete(namespaces.With(context.Background(), "default"), plain); err != nil {
		t.Fatal(err)
	}
	if lost, err := h.Missing(h.ctx); err != nil || len(lost) != 1 || lost[0] != (content.Blob{Namespace: "one", Digest: plain}) {
		t.Errorf("%v, %v", lost, err)
	}
	if _, err := h.read(h.ctx, plain); !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
		t.Error(err)
	}
}

// TestHung: a program that does not answer is waited for once, and then for a while not asked.
func TestHung(t *testing.T) {
	p := newThere(t)
	h := newHere(t, p, content.Shared, proxy.Options{Quick: 200 * time.Millisecond, Slow: time.Second})
	d, err := h.add(h.ctx, noise(1000))
	if err != nil {
		t.Fatal(err)
	}
	wake := make(chan struct{})
	p.hung.Store(&wake)
	_, err = h.Writer(h.ctx, "r", "", 0)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "outside at "+p.socket+" did not answer within 200ms") {
		t.Error(err)
	}
	before := p.calls.Load()
	if _, err := h.read(h.ctx, d); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "has not answered since") {
		t.Error(err)
	}
	if n := p.calls.Load() - before; n != 0 {
		t.Errorf("it was asked %d times", n)
	}
	if err := h.b.Trouble(); err == nil || !strings.Contains(err.Error(), "has not answered since") {
		t.Error(err)
	}
	p.hung.Store(nil)
	close(wake)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err = h.read(h.ctx, d); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// TestRestore: records that the database has lost are made again by what is there; what is not what it says is left alone.
func TestRestore(t *testing.T) {
	p := newThere(t)
	b, err := proxy.New(proxy.Options{Name: "outside", Address: p.socket, Owner: "me"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }()
	ctx := namespaces.With(context.Background(), "default")
	good, err := (&here{Store: p.Store}).add(ctx, noise(2<<20))
	if err != nil {
		t.Fatal(err)
	}
	bad, err := (&here{Store: p.Store}).add(ctx, noise(40))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(p.dir, content.Dir, "blobs", "sha256", bad.Encoded())
	if err := errors.Join(os.Chmod(file, 0o600), os.WriteFile(file, noise(41)[1:], 0o600)); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	db, err := metadata.OpenAnyway(filepath.Join(dir, "db"), true, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	s, err := content.NewRemote(b, content.Shared, db, silent{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Restore(context.Background()); err != nil {
		t.Fatal(err)
	}
	if i, err := s.Info(ctx, good); err != nil || i.Size != 2<<20 {
		t.Errorf("%+v, %v", i, err)
	}
	if _, err := s.Info(ctx, bad); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if p.stored(bad) == nil {
		t.Error("the damaged blob is gone")
	}
	if err := s.Tidy(context.Background()); err != nil || p.stored(bad) == nil {
		t.Errorf("%v; there: %v", err, p.stored(bad))
	}
}
