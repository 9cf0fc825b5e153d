package content

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
)

func noise(n int) []byte {
	out := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(out)
	return out
}

func (e *env) partial(ctx context.Context, ref string, data []byte, part int64) *parallel {
	e.t.Helper()
	p, err := e.Partial(ctx, ref, digest.FromBytes(data), int64(len(data)), part)
	if err != nil {
		e.t.Fatal(err)
	}
	return p.(*parallel)
}

// put writes the next n bytes of part i.
func (p *parallel) put(t *testing.T, data []byte, i int, n int64) {
	t.Helper()
	for _, m := range p.Missing() {
		if m.Index == i {
			if _, err := p.WriteAt(data[m.Next:min(m.Next+n, m.End)], m.Next); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("part %d is whole", i)
}

// TestPartial: parts in any order, at the same time, read while they are written, and a blob in the end.
func TestPartial(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	data := noise(1<<20 + 17)
	p := e.partial(ctx, "layer-x", data, 64<<10)
	r, err := p.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	var rerr error
	var reading sync.WaitGroup
	reading.Go(func() { got, rerr = io.ReadAll(r) })
	var writing sync.WaitGroup
	missing := p.Missing()
	for _, half := range [][]Part{missing[len(missing)/2:], missing[:len(missing)/2]} {
		writing.Go(func() {
			for _, m := range half {
				for at := m.Next; at < m.End; {
					n, err := p.WriteAt(data[at:min(at+10_000, m.End)], at)
					if err != nil {
						t.Error(err)
						return
					}
					at += int64(n)
				}
			}
		})
	}
	writing.Wait()
	reading.Wait()
	if rerr != nil || !bytes.Equal(got, data) || r.Close() != nil {
		t.Errorf("read %d bytes of %d: %v", len(got), len(data), rerr)
	}
	if err := errors.Join(p.Commit(ctx, map[string]string{"a": "b"}), p.Close()); err != nil {
		t.Fatal(err)
	}
	if e.read(ctx, digest.FromBytes(data)) != string(data) {
		t.Error("the blob is another")
	}
	if i, err := e.Info(ctx, digest.FromBytes(data)); err != nil || i.Labels["a"] != "b" || i.Size != int64(len(data)) {
		t.Errorf("%+v, %v", i, err)
	}
	if _, err := e.Partial(ctx, "again", digest.FromBytes(data), int64(len(data)), 1); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if all, err := e.ListStatuses(ctx, filters.Always); err != nil || len(all) != 0 {
		t.Errorf("ingests are left: %v, %v", all, err)
	}
}

// TestPartialResumes: what is written counts for whoever comes next, of either kind, and after a boot what was synced.
func TestPartialResumes(t *testing.T) {
	data := noise(100)
	left := func(t *testing.T) (context.Context, *env) {
		ctx, e := newEnv(t, Shared)
		p := e.partial(ctx, "r", data, 30)
		p.put(t, data, 0, 30)
		p.put(t, data, 1, 5)
		p.put(t, data, 3, 4)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		e.restart()
		if st, err := e.Status(ctx, "r"); err != nil || st.Offset != 39 || st.Total != 100 {
			t.Fatalf("%+v, %v", st, err)
		}
		return ctx, e
	}
	table := func(e *env) string { return filepath.Join(e.own().ingest("one", "r"), partsFile) }
	for _, c := range []struct {
		name  string
		alter func(t *testing.T, e *env, record []byte) []byte
		have  int64
	}{
		{"killed", func(_ *testing.T, _ *env, r []byte) []byte { return r }, 39},
		{"booted", func(_ *testing.T, _ *env, r []byte) []byte {
			r[8]++
			binary.LittleEndian.PutUint32(r[partsHeader+4:], 20) // of part 0
			return r
		}, 20},
		{"damaged", func(_ *testing.T, _ *env, r []byte) []byte { return r[:len(r)-1] }, 0},
		{"of another size", func(_ *testing.T, _ *env, r []byte) []byte { return r[:len(r)-partsSlot] }, 0},
		{"beyond its part", func(_ *testing.T, _ *env, r []byte) []byte {
			binary.LittleEndian.PutUint32(r[partsHeader:], 31)
			return r
		}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, e := left(t)
			record, err := os.ReadFile(table(e))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(table(e), c.alter(t, e, record), 0o600); err != nil {
				t.Fatal(err)
			}
			p := e.partial(ctx, "r", data, 30)
			if got := p.Written(); got != c.have {
				t.Errorf("%d bytes are there, not %d", got, c.have)
			}
			for _, m := range p.Missing() {
				p.put(t, data, m.Index, 100)
			}
			if err := errors.Join(p.Commit(ctx, nil), p.Close()); err != nil {
				t.Fatal(err)
			}
			if e.read(ctx, digest.FromBytes(data)) != string(data) {
				t.Error("the blob is another")
			}
		})
	}
	t.Run("by one who appends", func(t *testing.T) {
		ctx, e := left(t)
		w := e.writer(ctx, "r", digest.FromBytes(data), 100)
		if st := w.Status(); st.Offset != 35 {
			t.Errorf("%+v", st)
		}
		e.write(w, string(data[35:]))
		if err := errors.Join(w.Commit(ctx, 100, "", nil), w.Close()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("from one who appended", func(t *testing.T) {
		ctx, e := newEnv(t, Shared)
		w := e.writer(ctx, "r", digest.FromBytes(data), 100)
		e.write(w, string(data[:70]))
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		p := e.partial(ctx, "r", data, 30)
		if m := p.Missing(); len(m) != 2 || m[0].Next != 70 || m[1].Next != 90 {
			t.Errorf("%+v", m)
		}
		p.put(t, data, 3, 10)
		p.put(t, data, 2, 20)
		if err := errors.Join(p.Commit(ctx, nil), p.Close()); err != nil {
			t.Fatal(err)
		}
	})
}

// TestPartialErrors: what is wrong is said, and what is of no use does not stay.
func TestPartialErrors(t *testing.T) {
	ctx, e := newEnv(t, Shared)
	data := noise(100)
	p := e.partial(ctx, "r", data, 30)
	for _, c := range []struct{ off, n int64 }{{1, 1}, {0, 31}, {-1, 1}, {90, 11}, {120, 1}} {
		if _, err := p.WriteAt(make([]byte, c.n), c.off); !errdefs.IsOutOfRange(err) {
			t.Errorf("%d bytes at %d: %v", c.n, c.off, err)
		}
	}
	if _, err := e.Partial(ctx, "r", digest.FromBytes(data), 100, 30); !errdefs.IsUnavailable(err) {
		t.Errorf("a second one: %v", err)
	}
	if err := p.Commit(ctx, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "bytes 0 to 30 are missing") {
		t.Error(err)
	}
	r, err := p.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		p.put(t, make([]byte, 100), i, 30)
	}
	if err := p.Commit(ctx, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), digest.FromBytes(data).String()) {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || len(got) != 100 {
		t.Errorf("%d bytes of 100 that were all there: %v", len(got), err)
	}
	_ = r.Close()
	if _, err := e.Status(ctx, "r"); !errdefs.IsNotFound(err) {
		t.Errorf("bytes with another digest stay: %v", err)
	}

	p = e.partial(ctx, "r", data, 30)
	if r, err = p.Open(ctx); err != nil {
		t.Fatal(err)
	}
	p.put(t, data, 0, 5)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); !errdefs.IsAborted(err) || !bytes.Equal(got, data[:5]) {
		t.Errorf("read of one that was closed: %q, %v", got, err)
	}
	_ = r.Close()

	p = e.partial(ctx, "r", data, 30)
	if err := e.Abort(ctx, "r"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt(data[5:6], 5); !errdefs.IsAborted(err) {
		t.Errorf("write to one that was aborted: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}

	full := func(err error) bool { return errors.Is(err, unix.ENOSPC) }
	for size, is := range map[int64]func(error) bool{1 << 60: errdefs.IsInvalidArgument, 1 << 49: full} {
		if _, err := e.Partial(ctx, "huge", digest.FromString("x"), size, 1<<20); !is(err) || !strings.Contains(err.Error(), "no room") {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if _, err := e.Status(ctx, "huge"); !errdefs.IsNotFound(err) {
		t.Errorf("what has no room stays: %v", err)
	}
	if _, err := e.Partial(ctx, "r", "nonsense", 1, 1); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	empty := e.partial(ctx, "empty", nil, 30)
	if err := errors.Join(empty.Commit(ctx, nil), empty.Close()); err != nil {
		t.Error(err)
	}
}

func FuzzParts(f *testing.F) {
	f.Add(newParts(100, 30).encode(), int64(100))
	f.Add(newParts(0, 30).encode(), int64(0))
	f.Add([]byte(partsMagic), int64(1))
	f.Fuzz(func(t *testing.T, data []byte, total int64) {
		p, err := decodeParts(data)
		if err != nil || total < 0 || total > 1<<50 || !p.fits(total) {
			return
		}
		if n := p.written(); n < 0 || n > total || p.prefix() > total+p.size {
			t.Errorf("%d bytes written, %d from the beginning, of %d", n, p.prefix(), total)
		}
		if !bytes.Equal(p.encode(), data) {
			t.Error("it is written another way than it was read")
		}
	})
}

// TestPartialCommitKilled: a commit that was interrupted after the blob had its place is made again without the bytes, and
// one that was interrupted later leaves no ingest.
func TestPartialCommitKilled(t *testing.T) {
	data := noise(100)
	d := digest.FromBytes(data)
	ctx, e := newEnv(t, Shared)
	p := e.partial(ctx, "r", data, 30)
	for i := range 4 {
		p.put(t, data, i, 30)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	dir := e.own().ingest("one", "r")
	if err := errors.Join(makeDir(filepath.Dir(e.path(d))), place(dir, e.path(d))); err != nil {
		t.Fatal(err)
	}
	e.restart()
	if _, err := os.Stat(e.path(d)); err == nil {
		t.Error("a blob without a record stays")
	}
	p = e.partial(ctx, "r", data, 30)
	if m := p.Missing(); len(m) != 0 {
		t.Errorf("%+v are missing", m)
	}
	if err := errors.Join(p.Commit(ctx, nil), p.Close()); err != nil {
		t.Fatal(err)
	}

	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "ref"), []byte("one\x00r"), 0o600), os.Link(e.path(d), filepath.Join(dir, "data"))); err != nil {
		t.Fatal(err)
	}
	e.restart()
	if _, err := e.Status(ctx, "r"); !errdefs.IsNotFound(err) {
		t.Errorf("the ingest of a blob stays: %v", err)
	}
	if e.read(ctx, d) != string(data) {
		t.Error("the blob is another")
	}
}
