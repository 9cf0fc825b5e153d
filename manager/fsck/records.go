package fsck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/opencontainers/runtime-spec/specs-go"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/orphans"
	records "github.com/managerd/managerd/protos/metadata"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
)

// tasks gives the tasks, and the paths of their FIFOs as the tables in their bundles have them.
func (c *Checker) tasks() map[orphans.Task][]string {
	out := map[orphans.Task][]string{}
	for _, t := range c.Tasks() {
		out[t] = nil
		tables, _ := filepath.Glob(filepath.Join(c.State, bundle.Dir, t.Namespace, t.ID, shimapi.TableDir, "*"))
		inits, _ := filepath.Glob(filepath.Join(c.State, bundle.Dir, t.Namespace, t.ID, shimapi.TableDir, ".*"))
		for _, file := range append(tables, inits...) {
			var p shimstate.Process
			if data, err := os.ReadFile(file); err == nil && p.Unmarshal(data) == nil {
				out[t] = append(out[t], p.Stdin, p.Stdout, p.Stderr)
			}
		}
	}
	return out
}

// cgroups enters the cgroups that tasks of this daemon have, or had, by their containers' specs, by their bundles, and by
// the events that told of them, whose cgroup is the default one then.
func (c *Checker) cgroups(into map[string][]orphans.Task) error {
	add := func(path string, t orphans.Task) {
		if path = filepath.Clean(path); !slices.Contains(into[path], t) {
			into[path] = append(into[path], t)
		}
	}
	enter := func(t orphans.Task, spec []byte) {
		var s specs.Spec
		if json.Unmarshal(spec, &s) == nil && s.Linux != nil {
			if path := cgroupOf(s.Linux.CgroupsPath); path != "" {
				add(path, t)
			}
		}
	}
	if c.Events != nil {
		r := c.Events.Read(0)
		defer r.Close()
		for {
			item, err := r.Next(context.Background(), false)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return fmt.Errorf("cannot look for the cgroups of past tasks: %w", err)
			}
			var e eventtypes.TaskCreate
			if item.Event == nil || item.Event.Topic != "/tasks/create" || proto.Unmarshal(item.Event.Value, &e) != nil {
				continue
			}
			if t := (orphans.Task{Namespace: item.Event.Namespace, ID: e.ContainerID}); t.ID != "" {
				add("/"+t.Namespace+"/"+t.ID, t)
			}
		}
	}
	all, err := bundle.Existing(c.State).List()
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	for _, b := range all {
		if _, spec, err := b.Record(); err == nil {
			enter(orphans.Task{Namespace: b.Namespace, ID: b.ID}, spec)
		}
	}
	if err := c.eachContainer(func(ns, id string, r *records.Container) error {
		enter(orphans.Task{Namespace: ns, ID: id}, r.Spec.GetValue())
		return nil
	}); err != nil || c.Sandboxes == nil {
		return err
	}
	return c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Sandboxes)...), func(id string, r *records.Sandbox) error {
			enter(orphans.Task{Namespace: ns, ID: id, Sandbox: true}, r.Spec.GetValue())
			return nil
		})
	})
}

func (c *Checker) eachNamespace(fn func(tx *metadata.Tx, ns string) error) error {
	return c.DB.View(func(tx *metadata.Tx) error {
		return tx.Bucket(metadata.Path()...).ForEachBucket(func(ns []byte) error { return fn(tx, string(ns)) })
	})
}

func (c *Checker) eachContainer(fn func(ns, id string, r *records.Container) error) error {
	return c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Containers)...), func(id string, r *records.Container) error {
			return fn(ns, id, r)
		})
	})
}

// records finds those that cannot be read. Fixing one sets it aside in the bucket "damaged", by its path.
func (c *Checker) records(Options, map[orphans.Task][]string) (out []orphans.Orphan, err error) {
	err = c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		return metadata.EachDamaged(tx, ns, func(path []string, key string, cause error) error {
			object := strings.Join(append(slices.Clone(path), strconv.Quote(key)), "/")
			out = append(out, orphans.New(Record, object, ns, fmt.Sprintf("it cannot be read: %v", cause), func(context.Context) error {
				return c.DB.SetAside(path, key)
			}))
			return nil
		})
	})
	return out, err
}

// unowned finds tasks whose container is not known.
func (c *Checker) unowned(_ Options, tasks map[orphans.Task][]string) (out []orphans.Orphan, err error) {
	known := map[orphans.Task]bool{}
	if err := c.eachContainer(func(ns, id string, _ *records.Container) error {
		known[orphans.Task{Namespace: ns, ID: id}] = true
		return nil
	}); err != nil {
		return nil, err
	}
	for t := range tasks {
		if known[t] {
			continue
		}
		o := orphans.New(orphans.Bundle, t.String(), t.String(), "a task without a container", func(context.Context) error {
			return fmt.Errorf("it may run: `%s` ends and removes it", mctl(t.Namespace, "tasks", "rm", "--force", t.ID))
		})
		o.Command = mctl(t.Namespace, "tasks", "rm", "--force", t.ID)
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b orphans.Orphan) int { return strings.Compare(a.Object, b.Object) })
	return out, nil
}

// expireLabel holds the time after which a lease no longer counts (package leases).
const expireLabel = "containerd.io/gc.expire"

// leases finds those that have expired, and those that keep only what is not there any more.
func (c *Checker) leases(o Options, _ map[orphans.Task][]string) (out []orphans.Orphan, err error) {
	err = c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Leases)...), func(id string, r *records.Lease) error {
			problem := ""
			if at, err := time.Parse(time.RFC3339, r.Labels[expireLabel]); err == nil && at.Before(time.Now()) {
				problem = "it expired at " + at.Format(time.RFC3339)
			} else if n, there := keeps(tx, ns, id); n > 0 && there == 0 && old(r.CreatedAt, o) {
				problem = fmt.Sprintf("nothing of the %d things that it keeps is there any more", n)
			}
			if problem == "" {
				return nil
			}
			x := orphans.New(Lease, ns+"/"+id, ns, problem, func(context.Context) error { return c.removeLease(ns, id) })
			x.Command = mctl(ns, "leases", "rm", id)
			out = append(out, x)
			return nil
		})
	})
	return out, err
}

func old(createdAt int64, o Options) bool { return time.Since(metadata.Time(createdAt)) >= o.Older }

// keeps counts what a lease keeps, and what of it is there. Of what is no record (ingests, mounts) it is believed.
func keeps(tx *metadata.Tx, ns, lease string) (all, there int) {
	b := tx.Bucket(metadata.Path(ns, metadata.LeaseResources, lease)...)
	if b == nil {
		return 0, 0
	}
	_ = b.ForEach(func(k, _ []byte) error { // the function never fails
		typ, id, _ := strings.Cut(string(k), "\x00")
		kind, sub, _ := strings.Cut(typ, "/")
		path := metadata.Path(ns, kind)
		if sub != "" {
			path = append(path, sub)
		}
		all++
		if kind == "ingests" || kind == metadata.Mounts {
			there++
		} else if in := tx.Bucket(path...); in != nil && in.Get([]byte(id)) != nil {
			there++
		}
		return nil
	})
	return all, there
}

func (c *Checker) removeLease(ns, id string) error {
	return c.DB.Update(func(tx *metadata.Tx) error {
		if b := tx.Bucket(metadata.Path(ns, metadata.Leases)...); b != nil {
			if err := b.Delete([]byte(id)); err != nil {
				return err
			}
		}
		return dropBucket(tx.Bucket(metadata.Path(ns, metadata.LeaseResources)...), id)
	})
}

func dropBucket(in *bolt.Bucket, name string) error {
	if in == nil || in.Bucket([]byte(name)) == nil {
		return nil
	}
	return in.DeleteBucket([]byte(name))
}

// containers finds those without a task whose snapshot is gone: they can never run.
func (c *Checker) containers(o Options, tasks map[orphans.Task][]string) (out []orphans.Orphan, err error) {
	if c.Tasks == nil {
		return nil, nil
	}
	err = c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Containers)...), func(id string, r *records.Container) error {
			if _, runs := tasks[orphans.Task{Namespace: ns, ID: id}]; runs || r.SnapshotKey == "" || !c.local(r.Snapshotter) || !old(r.CreatedAt, o) {
				return nil
			}
			if b := tx.Bucket(metadata.Path(ns, metadata.Snapshots, r.Snapshotter)...); b != nil && b.Get([]byte(r.SnapshotKey)) != nil {
				return nil
			}
			problem := fmt.Sprintf("its %s snapshot %q is gone", r.Snapshotter, r.SnapshotKey)
			x := orphans.New(Container, ns+"/"+id, ns+"/"+id, problem, func(context.Context) error {
				return c.remove(ns, metadata.Containers, id)
			})
			x.Command = mctl(ns, "containers", "rm", id)
			out = append(out, x)
			return nil
		})
	})
	return out, err
}

// local says whether the database has the records of a snapshotter.
func (c *Checker) local(snapshotter string) bool {
	return c.Snapshots != nil && slices.Contains(c.Snapshots.Names(), snapshotter)
}

func (c *Checker) remove(ns, kind, key string) error {
	return c.DB.Update(func(tx *metadata.Tx) error {
		if b := tx.Bucket(metadata.Path(ns, kind)...); b != nil {
			return b.Delete([]byte(key))
		}
		return nil
	})
}

// images finds names that stand for nothing.
func (c *Checker) images(o Options, _ map[orphans.Task][]string) (out []orphans.Orphan, err error) {
	if c.Content == nil {
		return nil, nil
	}
	err = c.eachNamespace(func(tx *metadata.Tx, ns string) error {
		blobs := tx.Bucket(metadata.Path(ns, metadata.Content)...)
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Images)...), func(name string, r *records.Image) error {
			if r.Target == nil || blobs != nil && blobs.Get([]byte(r.Target.Digest)) != nil || !old(r.UpdatedAt, o) {
				return nil
			}
			x := orphans.New(Image, ns+"/"+name, ns, fmt.Sprintf("its content %s is gone; pull it again, or remove the name", r.Target.Digest),
				func(context.Context) error { return c.remove(ns, metadata.Images, name) })
			x.Command = mctl(ns, "images", "rm", name)
			out = append(out, x)
			return nil
		})
	})
	return out, err
}
