package fsck

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/orphans"
	records "github.com/managerd/managerd/protos/metadata"
)

// The collector's labels: what has the first stays, what the second's value names too; what has the third goes with another.
const rootLabel, refLabel, backLabel = "containerd.io/gc.root", "containerd.io/gc.ref.snapshot.", "containerd.io/gc.bref."

// snapshots finds storage without a record, records without storage, storage that does not work, and what was made for a
// container that is not there.
func (c *Checker) snapshots(o Options, _ map[orphans.Task][]string) (out []orphans.Orphan, err error) {
	if c.Snapshots == nil {
		return nil, nil
	}
	for _, name := range c.Snapshots.Names() {
		mounted := mountedIDs(c.SnapshotRoot(name))
		unknown, err := c.Snapshots.Unknown(name)
		if err != nil {
			return out, err
		}
		for _, u := range unknown {
			owner, problem := "", "it is stored, and no record names it"
			if u.Key != "" {
				owner = u.Namespace
				problem += fmt.Sprintf("; it was %q", u.Key)
			}
			if mounted[u.ID] {
				continue // a container stands on it, whatever the database knows
			}
			out = append(out, orphans.New(Snapshot, fmt.Sprintf("%s/%d", name, u.ID), owner, problem, func(ctx context.Context) error {
				if mountedIDs(c.SnapshotRoot(name))[u.ID] {
					return fmt.Errorf("%s snapshot %d is mounted", name, u.ID)
				}
				return c.Snapshots.Free(ctx, name, u.ID)
			}))
		}
		broken, err := c.Snapshots.Broken(name)
		if err != nil {
			return out, err
		}
		for _, b := range broken {
			out = append(out, orphans.New(Snapshot, fmt.Sprintf("%s/%d", name, b.ID), b.Namespace, fmt.Sprintf("%s; it is %q", b.Problem, b.Key),
				func(context.Context) error { return c.Snapshots.Mend(name, b.ID) }))
		}
		missing, err := c.Snapshots.Missing(name)
		if err != nil {
			return out, err
		}
		for _, m := range missing {
			out = append(out, c.snapshot(name, m.Namespace, m.Key, "nothing of it is stored"))
		}
		unused, err := c.unused(name, o)
		if err != nil {
			return out, err
		}
		for _, x := range unused {
			if !slices.ContainsFunc(out, func(o orphans.Orphan) bool { return o.Name() == x.Name() }) {
				out = append(out, x)
			}
		}
	}
	return out, nil
}

// snapshot is one that has a record.
func (c *Checker) snapshot(name, ns, key, problem string) orphans.Orphan {
	x := orphans.New(Snapshot, fmt.Sprintf("%s/%s/%s", name, ns, key), ns, problem, func(ctx context.Context) error {
		sn, err := c.Snapshots.Snapshotter(name)
		if err != nil {
			return err
		}
		if err := sn.Remove(namespaces.With(ctx, ns), key); !errdefs.IsNotFound(err) {
			return err
		}
		return nil
	})
	x.Command = mctl(ns, "snapshots", "--snapshotter", name, "rm", key)
	return x
}

// unused finds active snapshots and views that no container, lease or label keeps: the collector's garbage, if it does not work.
func (c *Checker) unused(name string, o Options) (out []orphans.Orphan, err error) {
	mounted := mountedIDs(c.SnapshotRoot(name))
	err = c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		used := map[string]bool{}
		keep := func(labels map[string]string) {
			for l, v := range labels {
				if after, ok := strings.CutPrefix(l, refLabel); ok {
					if sn, _, _ := strings.Cut(after, "/"); sn == name {
						used[v] = true
					}
				}
			}
		}
		keepers := []error{
			metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Containers)...), func(_ string, r *records.Container) error {
				if r.Snapshotter == name {
					used[r.SnapshotKey] = true
				}
				keep(r.Labels)
				return nil
			}),
			metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Sandboxes)...), func(_ string, r *records.Sandbox) error { keep(r.Labels); return nil }),
			metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Images)...), func(_ string, r *records.Image) error { keep(r.Labels); return nil }),
			metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(_ string, r *records.Blob) error { keep(r.Labels); return nil }),
		}
		if all := tx.Bucket(metadata.Path(ns, metadata.Snapshots)...); all != nil {
			keepers = append(keepers, all.ForEachBucket(func(of []byte) error {
				return metadata.EachStrict(all.Bucket(of), func(_ string, r *records.Snapshot) error { keep(r.Labels); return nil })
			}))
		}
		if errors.Join(keepers...) != nil {
			return nil //nolint:nilerr // it is told as a record; until then nobody knows what it keeps
		}
		if all := tx.Bucket(metadata.Path(ns, metadata.LeaseResources)...); all != nil {
			_ = all.ForEachBucket(func(lease []byte) error { // the functions never fail
				return all.Bucket(lease).ForEach(func(k, _ []byte) error {
					if typ, key, _ := strings.Cut(string(k), "\x00"); typ == "snapshots/"+name {
						used[key] = true
					}
					return nil
				})
			})
		}
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Snapshots, name)...), func(key string, r *records.Snapshot) error {
			if r.Kind == "committed" || used[key] || kept(r.Labels) || mounted[r.Id] || !old(r.UpdatedAt, o) {
				return nil
			}
			out = append(out, c.snapshot(name, ns, key, "no container, lease or label keeps it, and it is not mounted"))
			return nil
		})
	})
	return out, err
}

// kept says whether labels keep a snapshot, or may: whether what it goes with stays is for the collector to find.
func kept(labels map[string]string) bool {
	for l := range labels {
		if l == rootLabel || strings.HasPrefix(l, backLabel) {
			return true
		}
	}
	return false
}

// mountedIDs gives the snapshots below root that some process sees mounted.
func mountedIDs(root string) map[uint64]bool {
	out := map[uint64]bool{}
	id := regexp.MustCompile(regexp.QuoteMeta(filepath.Join(root, "snapshots")) + `/([0-9]+)`)
	files, _ := filepath.Glob("/proc/[0-9]*/mountinfo") // the pattern is right
	seen := map[string]bool{}
	for _, f := range files {
		ns, err := os.Readlink(filepath.Join(filepath.Dir(f), "ns", "mnt"))
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		data, _ := os.ReadFile(f)
		for _, m := range id.FindAllSubmatch(data, -1) {
			if n, err := strconv.ParseUint(string(m[1]), 10, 64); err == nil {
				out[n] = true
			}
		}
	}
	return out
}

// content finds blobs without a record, records without a blob, and ingests that nobody writes.
func (c *Checker) content(o Options, _ map[orphans.Task][]string) (out []orphans.Orphan, err error) {
	if c.Content == nil {
		return nil, nil
	}
	if on, err := c.DB.Recovering(metadata.PartContent); err != nil || on {
		if err == nil {
			err = fmt.Errorf("content is still being read for its recovery; ask again later: %w", errdefs.ErrUnavailable)
		}
		return nil, err
	}
	unknown, err := c.Content.Unknown(context.Background())
	if err != nil {
		return nil, err
	}
	for _, d := range unknown {
		out = append(out, orphans.New(Content, d.String(), "", "it is stored, and no namespace has a record of it", func(context.Context) error {
			return c.Content.Free(d)
		}))
	}
	missing, err := c.Content.Missing(context.Background())
	if err != nil {
		return out, err
	}
	for _, b := range missing {
		out = append(out, orphans.New(Content, b.Namespace+"/"+b.Digest.String(), b.Namespace, "there is a record of it, and no blob, or one of another size",
			func(ctx context.Context) error {
				if err := c.Content.Delete(namespaces.With(ctx, b.Namespace), b.Digest); !errdefs.IsNotFound(err) {
					return err
				}
				return nil
			}))
	}
	ingests, err := c.Content.Idle(context.Background())
	if err != nil {
		return out, err
	}
	leased, err := c.leasedIngests()
	if err != nil {
		return out, err
	}
	for _, i := range ingests {
		if time.Since(i.UpdatedAt) < o.Older || slices.Contains(leased, i.Namespace+"\x00"+i.Ref) {
			continue
		}
		out = append(out, orphans.New(Ingest, i.Namespace+"/"+i.Ref, i.Namespace,
			fmt.Sprintf("nobody writes it since %s; %d bytes would have to be fetched again", i.UpdatedAt.UTC().Format(time.RFC3339), i.Offset),
			func(ctx context.Context) error { return c.Content.AbortIdle(ctx, i) }))
	}
	return out, nil
}

func (c *Checker) leasedIngests() (out []string, err error) {
	err = c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		all := tx.Bucket(metadata.Path(ns, metadata.LeaseResources)...)
		if all == nil {
			return nil
		}
		return all.ForEachBucket(func(lease []byte) error {
			return all.Bucket(lease).ForEach(func(k, _ []byte) error {
				if typ, ref, _ := strings.Cut(string(k), "\x00"); typ == "ingests" {
					out = append(out, ns+"\x00"+ref)
				}
				return nil
			})
		})
	})
	return out, err
}
