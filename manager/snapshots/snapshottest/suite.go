package snapshottest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/shimapi/mount"
)

// Case is one row.
type Case struct{ Name, Doc string }

var suite = []struct {
	Case
	run func(e *Env)
}{
	{Case{"Layers", "each sees its parents' files and its own changes, deletions too; a parent never changes; the same mounts are given again"}, layers},
	{Case{"View", "a view is read-only, of nothing, of one layer, of many; it cannot be committed"}, view},
	{Case{"Kinds", "only committed ones are parents, only the others have mounts"}, kinds},
	{Case{"Names", "taken, missing, empty, too long: the right code; keys are no paths"}, names},
	{Case{"Labels", "update by field mask; a commit keeps only its own"}, labels},
	{Case{"Usage", "what a snapshot takes by itself; the same before and after its commit"}, usage},
	{Case{"Children", "no removal while somebody stands on it"}, children},
	{Case{"Namespaces", "one namespace does not see another's"}, isolation},
	{Case{"Leases", "a lease gets what is made in it, and follows a commit"}, leased},
	{Case{"Filters", "walk with filters, in order; what is called may write"}, filtered},
	{Case{"Concurrent", "of many with one key one wins; cleanup beside them takes nothing"}, concurrent},
	{Case{"Ref", "a target that is there already is said so"}, ref},
	{Case{"RootAttributes", "owner and mode of the root are its parent's"}, rootAttributes},
	{Case{"Deep", "100 layers; 20 where each is a whole file system"}, deep},
	{Case{"Remove", "removal, and cleanup behind it, give all storage back"}, removal},
}

// Cases are the rows of the table.
func Cases() []Case {
	var out []Case
	for _, s := range suite {
		out = append(out, s.Case)
	}
	return append(out, Case{"Crash", "storage without a record is swept at the start and nothing else; a record that cannot be read stops the sweep"})
}

// Run is the suite.
func Run(t *testing.T, c Column) {
	for _, s := range suite {
		t.Run(s.Name, func(t *testing.T) {
			dir := c.Dir(t)
			all := filepath.Dir(t.TempDir()) // of every temporary directory of this test
			before := mountsOf(t, all)
			e, _ := Open(t, dir, c.Open)
			e.Column = c
			s.run(e)
			for _, line := range mountsOf(t, all) {
				if !slices.Contains(before, line) && !(c.Keeps && strings.HasPrefix(strings.Fields(line)[4], e.Root+"/")) {
					t.Errorf("a mount was left: %s", line)
				}
			}
		})
	}
	t.Run("Crash", func(t *testing.T) { crash(t, c) })
}

func layers(e *Env) {
	e.Prepare("a", "", func(r string) { e.write(r, "a", "1"); e.write(r, "both", "a"); e.write(r, "dir/gone", "x") })
	e.Prepare("b", "a", func(r string) {
		e.has(r, "a", "1")
		e.write(r, "both", "b")
		e.Must(os.RemoveAll(filepath.Join(r, "dir")))
		e.write(r, "dir/new", "y")
	})
	m, err := e.S.Prepare(e.Ctx, "c", "b", nil)
	e.Must(err)
	e.On(m, func(r string) {
		e.has(r, "a", "1")
		e.has(r, "both", "b")
		e.has(r, "dir/new", "y")
		e.hasNot(r, "dir/gone")
		e.write(r, "own", "c")
	})
	// Neither parent has changed.
	for parent, want := range map[string]string{"a": "a", "b": "b"} {
		v, err := e.S.View(e.Ctx, "view-"+parent, parent, nil)
		e.Must(err)
		e.On(v, func(r string) { e.has(r, "both", want); e.hasNot(r, "own") })
	}
	// Mounts gives the same again, and what was written is there.
	again, err := e.S.Mounts(e.Ctx, "c")
	e.Must(err)
	e.On(again, func(r string) { e.has(r, "own", "c") })
	if fmt.Sprint(again) != fmt.Sprint(m) {
		e.T.Errorf("mounts are %v, were %v", again, m)
	}
	want := []string{"/snapshot/prepare a-active", "/snapshot/commit a-active", "/snapshot/prepare b-active", "/snapshot/commit b-active", "/snapshot/prepare c"}
	if got := e.Events.take(); !slices.Equal(got[:5], want) {
		e.T.Errorf("events: %q", got)
	}
}

func view(e *Env) {
	e.Prepare("a", "", func(r string) { e.write(r, "f", "1") })
	e.Prepare("b", "a", func(r string) { e.write(r, "g", "2") })
	for _, parent := range []string{"", "a", "b"} {
		m, err := e.S.View(e.Ctx, "v"+parent, parent, nil)
		e.Must(err)
		if len(m) != 1 || !mount.ReadOnly(m[0]) {
			e.T.Errorf("view of %q is not read-only: %v", parent, m)
		}
		e.On(m, func(r string) {
			e.Is(os.WriteFile(filepath.Join(r, "x"), nil, 0o644), unix.EROFS)
			if parent != "" {
				e.has(r, "f", "1")
			}
		})
	}
	e.Is(e.S.Commit(e.Ctx, "n", "vb", nil), errdefs.ErrFailedPrecondition)
}

func kinds(e *Env) {
	e.Prepare("c", "", func(string) {})
	_, err := e.S.Prepare(e.Ctx, "x", "c", nil)
	e.Must(err)
	_, err = e.S.Prepare(e.Ctx, "y", "x", nil)
	e.Is(err, errdefs.ErrInvalidArgument) // x is active
	_, err = e.S.Mounts(e.Ctx, "c")
	e.Is(err, errdefs.ErrFailedPrecondition)
	e.Is(e.S.Commit(e.Ctx, "d", "c", nil), errdefs.ErrFailedPrecondition)
	for name, kind := range map[string]snapshots.Kind{"c": snapshots.Committed, "x": snapshots.Active} {
		i, err := e.S.Stat(e.Ctx, name)
		e.Must(err)
		if i.Kind != kind || i.Name != name || i.Created.IsZero() || i.Updated.IsZero() {
			e.T.Errorf("%+v", i)
		}
	}
}

func names(e *Env) {
	_, err := e.S.Prepare(e.Ctx, "k", "", nil)
	e.Must(err)
	_, err = e.S.Prepare(e.Ctx, "k", "", nil)
	e.Is(err, errdefs.ErrAlreadyExists)
	_, err = e.S.View(e.Ctx, "k", "", nil)
	e.Is(err, errdefs.ErrAlreadyExists)
	_, err = e.S.Prepare(e.Ctx, "l", "missing", nil)
	e.Is(err, errdefs.ErrNotFound)
	e.Is(e.S.Commit(e.Ctx, "k", "k", nil), errdefs.ErrAlreadyExists)
	e.Is(e.S.Commit(e.Ctx, "n", "missing", nil), errdefs.ErrNotFound)
	e.Is(e.S.Remove(e.Ctx, "missing"), errdefs.ErrNotFound)
	_, err = e.S.Stat(e.Ctx, "missing")
	e.Is(err, errdefs.ErrNotFound)
	_, err = e.S.Mounts(e.Ctx, "missing")
	e.Is(err, errdefs.ErrNotFound)
	_, err = e.S.Usage(e.Ctx, "missing")
	e.Is(err, errdefs.ErrNotFound)
	for _, bad := range []string{"", "a\x00b", strings.Repeat("x", 5000)} {
		_, err = e.S.Prepare(e.Ctx, bad, "", nil)
		e.Is(err, errdefs.ErrInvalidArgument)
		e.Is(e.S.Commit(e.Ctx, bad, "k", nil), errdefs.ErrInvalidArgument)
	}
	_, err = e.S.Prepare(context.Background(), "x", "", nil)
	e.Is(err, errdefs.ErrFailedPrecondition) // no namespace
	e.Must(e.S.Commit(e.Ctx, "n", "k", nil))
	_, err = e.S.Stat(e.Ctx, "k")
	e.Is(err, errdefs.ErrNotFound)
	_, err = e.S.Prepare(e.Ctx, "../../k", "n", nil) // keys are no paths
	e.Must(err)
	_, err = e.Store.Snapshotter("missing")
	e.Is(err, errdefs.ErrInvalidArgument)
}

func labels(e *Env) {
	_, err := e.S.Prepare(e.Ctx, "k", "", map[string]string{"a": "1", "b": "2"})
	e.Must(err)
	i, err := e.S.Update(e.Ctx, snapshots.Info{Name: "k", Labels: map[string]string{"a": "x", "c": "3"}}, "labels.a", "labels.b")
	e.Must(err)
	if fmt.Sprint(i.Labels) != "map[a:x]" {
		e.T.Errorf("labels: %v", i.Labels)
	}
	i, err = e.S.Update(e.Ctx, snapshots.Info{Name: "k", Labels: map[string]string{"z": "1"}})
	e.Must(err)
	if fmt.Sprint(i.Labels) != "map[z:1]" || !i.Updated.After(i.Created) {
		e.T.Errorf("%+v", i)
	}
	_, err = e.S.Update(e.Ctx, snapshots.Info{Name: "k"}, "parent")
	e.Is(err, errdefs.ErrInvalidArgument)
	_, err = e.S.Update(e.Ctx, snapshots.Info{Name: "missing"}, "labels")
	e.Is(err, errdefs.ErrNotFound)
	_, err = e.S.Prepare(e.Ctx, "l", "", map[string]string{"k": strings.Repeat("v", 5000)})
	e.Is(err, errdefs.ErrInvalidArgument)
	e.Must(e.S.Commit(e.Ctx, "n", "k", map[string]string{"only": "this"}))
	i, err = e.S.Stat(e.Ctx, "n")
	e.Must(err)
	if fmt.Sprint(i.Labels) != "map[only:this]" {
		e.T.Errorf("labels after commit: %v", i.Labels)
	}
}

func usage(e *Env) {
	m, err := e.S.Prepare(e.Ctx, "k", "", nil)
	e.Must(err)
	empty, err := e.S.Usage(e.Ctx, "k")
	e.Must(err)
	e.On(m, func(r string) {
		e.write(r, "f", strings.Repeat("x", 100<<10))
		e.Must(os.Link(filepath.Join(r, "f"), filepath.Join(r, "g")))
		fd, err := os.Open(r)
		e.Must(err)
		e.Must(unix.Syncfs(int(fd.Fd()))) // blocks are counted once they are allocated
		e.Must(fd.Close())
	})
	u, err := e.S.Usage(e.Ctx, "k")
	e.Must(err)
	inodes, most := int64(1), int64(150<<10)
	if e.Column.Blocks {
		inodes, most = 0, 2<<20
	}
	if u.Inodes != empty.Inodes+inodes || u.Size-empty.Size < 100<<10 || u.Size-empty.Size > most {
		e.T.Errorf("a file of 100 KiB with two names counts %+v, empty is %+v", u, empty)
	}
	e.Must(e.S.Commit(e.Ctx, "n", "k", nil))
	c, err := e.S.Usage(e.Ctx, "n")
	e.Must(err)
	if e.Column.Repacks && c.Inodes == u.Inodes && c.Size >= 100<<10 && c.Size < u.Size+16<<10 {
		return
	}
	if c != u {
		e.T.Errorf("committed %+v, active %+v", c, u)
	}
}

func children(e *Env) {
	e.Prepare("a", "", func(string) {})
	e.Prepare("ab", "", func(string) {}) // whose name begins alike
	e.Prepare("b", "a", func(string) {})
	_, err := e.S.View(e.Ctx, "v", "ab", nil)
	e.Must(err)
	e.Is(e.S.Remove(e.Ctx, "a"), errdefs.ErrFailedPrecondition)
	e.Is(e.S.Remove(e.Ctx, "ab"), errdefs.ErrFailedPrecondition)
	for _, n := range []string{"b", "a", "v", "ab"} {
		e.Must(e.S.Remove(e.Ctx, n))
	}
	e.Is(e.S.Remove(e.Ctx, "a"), errdefs.ErrNotFound)
	e.Must(e.DB.View(func(tx *metadata.Tx) error {
		if b := tx.Bucket(metadata.Path("one", metadata.Snapshots, Name)...); b != nil {
			e.T.Error("the bucket of a namespace without snapshots is there")
		}
		return nil
	}))
}

func isolation(e *Env) {
	two := namespaces.With(context.Background(), "two")
	m1, err := e.S.Prepare(e.Ctx, "k", "", nil)
	e.Must(err)
	m2, err := e.S.Prepare(two, "k", "", nil)
	e.Must(err)
	e.On(m1, func(r string) { e.write(r, "f", "one") })
	e.On(m2, func(r string) { e.hasNot(r, "f"); e.write(r, "f", "two") })
	e.On(m1, func(r string) { e.has(r, "f", "one") })
	e.Must(e.S.Commit(two, "n", "k", nil))
	_, err = e.S.Prepare(e.Ctx, "x", "n", nil)
	e.Is(err, errdefs.ErrNotFound)
	e.Must(e.S.Remove(two, "n"))
	e.On(m1, func(r string) { e.has(r, "f", "one") })
}

func leased(e *Env) {
	ls := leases.NewStore(e.DB)
	l, err := ls.Create(e.Ctx, "lease", nil)
	e.Must(err)
	ctx := leases.With(e.Ctx, l.ID)
	kept := func() string {
		rs, err := ls.ListResources(e.Ctx, l.ID)
		e.Must(err)
		return fmt.Sprint(rs)
	}
	_, err = e.S.Prepare(ctx, "k", "", nil)
	e.Must(err)
	if kept() != "[{k snapshots/"+Name+"}]" {
		e.T.Error(kept())
	}
	e.Must(e.S.Commit(ctx, "n", "k", nil))
	if kept() != "[{n snapshots/"+Name+"}]" {
		e.T.Error(kept())
	}
	_, err = e.S.Prepare(leases.With(e.Ctx, "unknown"), "x", "", nil)
	e.Is(err, errdefs.ErrNotFound)
	_, err = e.S.Stat(e.Ctx, "x")
	e.Is(err, errdefs.ErrNotFound)
	e.Must(e.S.Remove(ctx, "n"))
	if kept() != "[]" {
		e.T.Error(kept())
	}
}

func filtered(e *Env) {
	e.Prepare("base", "", func(string) {})
	for i := range 3 {
		_, err := e.S.Prepare(e.Ctx, fmt.Sprint("k", i), "base", map[string]string{"n.x": fmt.Sprint(i)})
		e.Must(err)
	}
	for expr, want := range map[string][]string{
		"":                               {"base", "k0", "k1", "k2"},
		"kind==active":                   {"k0", "k1", "k2"},
		"kind==committed":                {"base"},
		"parent==base,labels.\"n.x\"==1": {"k1"},
		"name~=^k[12]":                   {"k1", "k2"},
	} {
		var exprs []string
		if expr != "" {
			exprs = []string{expr}
		}
		f, err := filters.ParseAll(exprs...)
		e.Must(err)
		var got []string
		e.Must(e.S.Walk(e.Ctx, f, func(i snapshots.Info) error { got = append(got, i.Name); return nil }))
		if !slices.Equal(got, want) {
			e.T.Errorf("%q: %v, want %v", expr, got, want)
		}
	}
	e.Is(e.S.Walk(e.Ctx, filters.Always, func(snapshots.Info) error { return os.ErrInvalid }), os.ErrInvalid)
	// fn may write.
	e.Must(e.S.Walk(e.Ctx, filters.Always, func(i snapshots.Info) error {
		if i.Kind == snapshots.Active {
			return e.S.Remove(e.Ctx, i.Name)
		}
		return nil
	}))
}

// concurrent: of many who make the same key one wins; others do not mind, and cleaning up beside it takes nothing away.
func concurrent(e *Env) {
	e.Prepare("base", "", func(r string) { e.write(r, "f", "1") })
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := map[string]int{}
	rounds := 10
	if testing.Short() {
		rounds = 3
	}
	for w := range 8 {
		wg.Go(func() {
			for i := range rounds {
				key := fmt.Sprint("shared-", i)
				_, err := e.S.Prepare(e.Ctx, key, "base", nil)
				mu.Lock()
				if err == nil {
					won[key]++
				} else {
					e.Is(err, errdefs.ErrAlreadyExists)
				}
				mu.Unlock()
				own := fmt.Sprintf("own-%d-%d", w, i)
				if _, err := e.S.Prepare(e.Ctx, own, "base", nil); err != nil {
					e.T.Error(err)
				}
				if i%2 == 0 {
					if err := e.S.Remove(e.Ctx, own); err != nil {
						e.T.Error(err)
					}
				}
				if err := e.S.Cleanup(e.Ctx); err != nil {
					e.T.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for i := range rounds {
		if n := won[fmt.Sprint("shared-", i)]; n != 1 {
			e.T.Errorf("shared-%d was prepared %d times", i, n)
		}
	}
	for w := range 8 {
		m, err := e.S.Mounts(e.Ctx, fmt.Sprintf("own-%d-1", w))
		e.Must(err)
		e.On(m, func(r string) { e.has(r, "f", "1"); e.write(r, "g", "2") })
	}
}

func ref(e *Env) {
	e.Prepare("target", "", func(string) {})
	_, err := e.S.Prepare(e.Ctx, "k", "", map[string]string{snapshots.LabelRef: "target"})
	e.Is(err, errdefs.ErrAlreadyExists)
	_, err = e.S.Prepare(e.Ctx, "k", "", map[string]string{snapshots.LabelRef: "other"})
	e.Must(err)
}

func rootAttributes(e *Env) {
	e.Prepare("a", "", func(r string) {
		e.Must(os.Chown(r, 12, 34))
		e.Must(os.Chmod(r, 0o2711))
		e.Must(unix.Chmod(r, 0o2711))
	})
	m, err := e.S.Prepare(e.Ctx, "b", "a", nil)
	e.Must(err)
	e.On(m, func(r string) {
		var st unix.Stat_t
		e.Must(unix.Stat(r, &st))
		if st.Uid != 12 || st.Gid != 34 || st.Mode&0o7777 != 0o2711 {
			e.T.Errorf("root is %o %d:%d", st.Mode, st.Uid, st.Gid)
		}
	})
}

// deep: more layers than fit into one page of mount options.
func deep(e *Env) {
	n := 100
	if e.Column.Blocks {
		n = 20
	}
	parent := ""
	for i := range n {
		name := fmt.Sprint("layer", i)
		e.Prepare(name, parent, func(r string) { e.write(r, fmt.Sprint("f", i), "x") })
		parent = name
	}
	m, err := e.S.Prepare(e.Ctx, "top", parent, nil)
	e.Must(err)
	e.On(m, func(r string) {
		for i := range n {
			e.has(r, fmt.Sprint("f", i), "x")
		}
	})
}

func removal(e *Env) {
	e.Prepare("a", "", func(r string) { e.write(r, "dir/f", "1") })
	e.Prepare("b", "a", func(r string) { e.write(r, "dir/g", "2") })
	m, err := e.S.Prepare(e.Ctx, "k", "b", nil)
	e.Must(err)
	e.On(m, func(r string) { e.write(r, "h", "3") })
	_, err = e.S.View(e.Ctx, "v", "b", nil)
	e.Must(err)
	for _, n := range []string{"v", "k", "b", "a"} {
		e.Must(e.S.Remove(e.Ctx, n))
	}
	e.Must(e.S.Cleanup(e.Ctx))
	if left, err := e.Column.Stored(e.Root); err != nil || len(left) > 0 {
		e.T.Errorf("stored: %v, %v", left, err)
	}
}

// crash: storage without a record is swept at the next start, and nothing else.
func crash(t *testing.T, c Column) {
	backend, stored, dir := c.Open, c.Stored, c.Dir(t)
	root := filepath.Join(dir, "root")
	e, stop := Open(t, dir, backend)
	e.Prepare("a", "", func(r string) { e.write(r, "f", "1") })
	_, err := e.S.Prepare(e.Ctx, "k", "a", nil)
	e.Must(err)
	before, err := stored(root)
	e.Must(err)
	stop()

	b, err := backend(root)
	e.Must(err)
	// As when the daemon dies between storage and record.
	e.Must(b.Create(e.Ctx, snapshots.Snapshot{Ref: snapshots.Ref{ID: 77, Namespace: "one", Key: "lost"}, Kind: snapshots.Active}))
	e.Must(b.Close())
	if after, err := stored(root); err != nil || len(after) != len(before)+1 {
		t.Fatalf("stored: %v, %v", after, err)
	}

	e, stop = Open(t, dir, backend)
	if c.Foreign { // what nothing waits for at the start
		e.Must(e.S.Cleanup(e.Ctx))
	}
	if after, err := stored(root); err != nil || !slices.Equal(after, before) {
		t.Errorf("after the sweep there is %v (%v), want %v", after, err, before)
	}
	m, err := e.S.Mounts(e.Ctx, "k")
	e.Must(err)
	e.On(m, func(r string) { e.has(r, "f", "1") })
	e.Must(e.S.Remove(e.Ctx, "k"))
	e.Must(e.S.Cleanup(e.Ctx))
	_, err = e.S.Prepare(e.Ctx, "k2", "a", nil)
	e.Must(err)
	ids, err := stored(root)
	e.Must(err)
	for _, id := range ids {
		if !slices.Contains(before, id) && len(id) < 2 {
			t.Errorf("ID %s was given out again", id)
		}
	}

	// A record that cannot be read must not have its storage swept.
	e.Must(e.DB.Update(func(tx *metadata.Tx) error {
		return tx.Bucket(metadata.Path("one", metadata.Snapshots, Name)...).Put([]byte("k2"), []byte("\xff\xff"))
	}))
	stop()
	e, _ = Open(t, dir, backend)
	if after, err := stored(root); err != nil || !slices.Equal(after, ids) {
		t.Errorf("with a damaged record there is %v (%v), want %v", after, err, ids)
	}
	e.Is(e.S.Cleanup(e.Ctx), errdefs.ErrDataLoss)
	if _, err := e.S.Stat(e.Ctx, "a"); err != nil {
		t.Errorf("another record: %v", err)
	}
}
