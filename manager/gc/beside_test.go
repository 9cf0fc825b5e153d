package gc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/sandboxes"
	"github.com/managerd/managerd/manager/snapshots"
	records "github.com/managerd/managerd/protos/metadata"
)

// TestChangedMeanwhile: what becomes needed after the collector has looked stays, with all that it leads to, whichever
// record says so.
func TestChangedMeanwhile(t *testing.T) {
	d := digest.FromString
	for name, need := range map[string]func(e *env){
		"image":     func(e *env) { e.image("i", d("z"), nil) },
		"container": func(e *env) { e.container("c", "", labels{labelRef + "content": d("z").String()}) },
		"sandbox": func(e *env) {
			_, err := sandboxes.NewStore(e.db).Create(e.ctx, sandboxes.Sandbox{ID: "pod", Labels: labels{labelRef + "content": d("z").String()}})
			e.must(err)
		},
		"lease": func(e *env) { e.lease("l", nil, leases.Resource{ID: d("z").String(), Type: leases.Content}) },
		"content": func(e *env) {
			_, err := e.content.Update(e.ctx, content.Info{Digest: d("kept"), Labels: labels{labelRoot: "", labelRef + "content": d("z").String()}}, "labels")
			e.must(err)
		},
		"snapshot": func(e *env) {
			e.snapshot(e.ctx, snapshots.Active, "late", "", labels{labelRef + "content": d("z").String()})
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			e.blob(e.ctx, "kept", labels{labelRoot: ""})
			e.blob(e.ctx, "below", nil)
			e.blob(e.ctx, "z", labels{labelRef + "content": d("below").String()})
			for i := range batch { // so that there is a first batch, without z and what is below: their digests are not among the least
				e.blob(e.ctx, smaller(i), nil)
			}
			var once sync.Once
			e.between = func() { once.Do(func() { need(e) }) }
			res := e.collect()
			if res.Removed[metadata.Content] != batch {
				t.Errorf("%v", res.Removed)
			}
			for _, text := range []string{"z", "below", "kept"} {
				if _, err := e.content.Info(e.ctx, d(text)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// smaller gives the i-th text whose digest is less than those of z and of below.
func smaller(i int) string {
	limit := min(digest.FromString("z"), digest.FromString("below"))
	for n := 0; ; n++ {
		if text := fmt.Sprint("t", n); digest.FromString(text) < limit {
			if i == 0 {
				return text
			}
			i--
		}
	}
}

// TestBesideWriters: clients make images under leases, as a pull does, and remove them, while collections run all the
// time: nothing that somebody counts on is ever missing, and in the end nothing is left.
func TestBesideWriters(t *testing.T) {
	e := newEnv(t)
	ctx, cancel := context.WithCancel(e.ctx)
	collections := make(chan int)
	go func() {
		n := 0
		for ctx.Err() == nil {
			if _, err := e.Collect(e.ctx); err != nil {
				t.Error(err)
				break
			}
			n++
		}
		collections <- n
	}()
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			for i := range 8 {
				pull(e, fmt.Sprintf("%d-%d", w, i), rng.IntN(4))
			}
		})
	}
	wg.Wait()
	cancel()
	if n := <-collections; n < 2 {
		t.Errorf("%d collections: nothing was tested", n)
	}
	e.collect()
	if left := e.left(nil); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// pull makes an image of a manifest and a few layers, one of them shared with others, unpacks, runs, and removes it.
func pull(e *env, name string, shared int) {
	ctx := e.lease(name, nil)
	text := []string{"manifest " + name, "layer " + name, fmt.Sprint("shared ", shared)}
	l := labels{}
	for i, t := range text[1:] {
		l[fmt.Sprint(labelRef, "content.l.", i)] = digest.FromString(t).String()
		w, err := e.content.Writer(ctx, "ref "+name, digest.FromString(t), 0)
		if errdefs.IsAlreadyExists(err) {
			continue
		}
		e.check(err)
		_, err = w.Write([]byte(t))
		e.check(err)
		if err := w.Commit(ctx, 0, "", nil); !errdefs.IsAlreadyExists(err) {
			e.check(err)
		}
		e.check(w.Close())
	}
	l[labelRef+"snapshot.native"] = "top " + name
	e.snapshot(ctx, snapshots.Committed, "top "+name, "", nil)
	e.blob(ctx, text[0], l)
	e.image(name, digest.FromString(text[0]), nil)
	e.snapshot(ctx, snapshots.Active, "rw "+name, "top "+name, nil)
	e.container(name, "rw "+name, nil)
	e.check(e.leases.Delete(e.ctx, name))
	for _, t := range text {
		_, err := e.content.Info(e.ctx, digest.FromString(t))
		e.check(err)
	}
	s, err := e.snapshots.Snapshotter("native")
	e.check(err)
	e.check(e.images.Delete(e.ctx, name, ""))
	_, err = s.Mounts(e.ctx, "rw "+name)
	e.check(err)
	e.check(e.containers.Delete(e.ctx, name))
}

// check is must for other goroutines.
func (e *env) check(err error) {
	if err != nil {
		e.t.Helper()
		e.t.Error(err)
	}
}

// TestDamaged: in a namespace with a record that cannot be read nothing is collected, in others it is.
func TestDamaged(t *testing.T) {
	e := newEnv(t)
	e.blob(e.ctx, "a", nil)
	other := namespaces.With(context.Background(), "two")
	e.blob(other, "b", nil)
	e.must(e.db.Update(func(tx *metadata.Tx) error {
		b, err := tx.MakeBucket(metadata.Path("one", metadata.Images)...)
		if err != nil {
			return err
		}
		return b.Put([]byte("i"), []byte("\xff\xff"))
	}))
	if _, err := e.Collect(e.ctx); !errdefs.IsDataLoss(err) {
		t.Errorf("%v", err)
	}
	if _, err := e.content.Info(e.ctx, digest.FromString("a")); err != nil {
		t.Error(err)
	}
	if _, err := e.content.Info(other, digest.FromString("b")); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}

// TestRecovered: after a recovery of the database nothing is collected until somebody has looked: what led to something may
// be what was lost.
func TestRecovered(t *testing.T) {
	e := newEnv(t)
	e.blob(e.ctx, "a", nil)
	e.must(e.db.Update(func(tx *metadata.Tx) error {
		b, err := tx.MakeBucket("recovery")
		if err != nil {
			return err
		}
		return metadata.Put(b, "record", &records.Recovery{Reason: metadata.Damaged})
	}))
	if res := e.collect(); !res.Held || len(res.Removed) != 0 {
		t.Errorf("%+v", res)
	}
	e.there("a")
	e.must(e.db.Acknowledge())
	if res := e.collect(); res.Held || res.Removed[metadata.Content] != 1 {
		t.Errorf("%+v", res)
	}
}

// TestIngests: what nobody has written to for a day goes, but not what a lease keeps or a client has open.
func TestIngests(t *testing.T) {
	e := newEnv(t)
	for _, ref := range []string{"plain", "leased"} {
		ctx := e.ctx
		if ref == "leased" {
			ctx = e.lease("l", nil)
		}
		w, err := e.content.Writer(ctx, ref, "", 0)
		e.must(err)
		e.must(w.Close())
	}
	w, err := e.content.Writer(e.ctx, "open", "", 0)
	e.must(err)
	defer w.Close()
	if res := e.collect(); len(res.Removed) != 0 {
		t.Errorf("%v", res.Removed)
	}
	kept := func() (map[string]bool, error) { return map[string]bool{"leased": true}, nil }
	if n, err := e.content.SweepIdle(e.ctx, time.Now().Add(time.Minute), kept); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := e.content.Status(e.ctx, "plain"); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}

// BenchmarkCollect looks at 100,000 objects, of which one in ten is garbage, and reports for how long at a stretch others
// could not write.
func BenchmarkCollect(b *testing.B) {
	const objects = 100_000
	for b.Loop() {
		b.StopTimer()
		e := newEnv(b)
		e.must(e.db.Update(func(tx *metadata.Tx) error {
			blobs, err := tx.MakeBucket(metadata.Path("one", metadata.Content)...)
			if err != nil {
				return err
			}
			for i := range objects {
				l := labels{}
				if i%10 != 0 {
					l[labelRoot] = ""
					l[labelRef+"content.l.0"] = digest.FromString(fmt.Sprint(i/10*10 + 1)).String()
				}
				if err := metadata.Put(blobs, digest.FromString(fmt.Sprint(i)).String(), &records.Blob{Size_: 1, Labels: l}); err != nil {
					return err
				}
			}
			return nil
		}))
		b.StartTimer()
		res := e.collect()
		b.ReportMetric(float64(res.Longest.Microseconds())/1000, "ms-locked-longest")
		b.ReportMetric(float64(res.Locked.Microseconds())/1000, "ms-locked")
		b.ReportMetric(float64(res.Removed[metadata.Content]), "removed")
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(res.Took.Milliseconds()), "ms")
	}
}
