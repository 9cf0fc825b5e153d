// Package fsck finds what nobody owns any more, with the daemon's eyes: beside what package orphans finds, all that the
// database and the stores contradict each other in. Each finding says whose it was and which command fixes it; Run does it
// too. What collection of garbage removes anyway in its time is not its business.
package fsck

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/eventlog"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/orphans"
	"github.com/managerd/managerd/manager/snapshots"
)

// The kinds that are found beside those of package orphans.
const (
	Snapshot  = "snapshot"
	Lease     = "lease"
	Content   = "content"
	Ingest    = "ingest"
	Container = "container"
	Image     = "image"
	Record    = "record"
	Database  = "database"
)

// rounds is how often Run looks again after it has fixed something: what it removed may have been the last owner of more.
const rounds = 4

// Checker finds. Fields may be nil where the daemon has no such part; then that is not looked at.
type Checker struct {
	State, Root string
	DB          *metadata.DB
	Content     *content.Store
	Snapshots   *snapshots.Store
	Events      *eventlog.Log
	// Tasks gives the tasks of all namespaces.
	Tasks func() []orphans.Task
	// Sandboxes gives the sandboxes of all namespaces; false: the daemon has no such part.
	Sandboxes func() ([]orphans.Task, bool)
	// Parts are those that a recovery must have done before it can be ended.
	Parts func() []string
	// Acknowledged is called when a recovery was ended.
	Acknowledged func()
	// SnapshotRoot is where a snapshotter stores.
	SnapshotRoot func(name string) string
}

// Options say what to do.
type Options struct {
	Fix     bool
	Objects []string      // KIND:OBJECT; none: all
	Older   time.Duration // what clients may be just making counts when it is older than this
	FIFOs   string        // see orphans.Places
}

// Result is an orphan, and what became of it.
type Result struct {
	orphans.Orphan
	Fixed bool
	Err   error
}

// Run finds what there is, and fixes it when it is to. The error says what could not be looked at; what was found is valid
// all the same.
func (c *Checker) Run(ctx context.Context, o Options) ([]Result, error) {
	found, err := c.find(o)
	wanted := func(x orphans.Orphan) bool { return len(o.Objects) == 0 || slices.Contains(o.Objects, x.Name()) }
	var out []Result
	if !o.Fix {
		for _, x := range found {
			if wanted(x) {
				out = append(out, Result{Orphan: x})
			}
		}
		return out, err
	}
	done := map[string]int{}
	for range rounds {
		fixed := 0
		for _, x := range found {
			if !wanted(x) || ctx.Err() != nil {
				continue
			}
			i, seen := done[x.Name()]
			if seen && out[i].Fixed {
				continue
			}
			r := Result{Orphan: x, Err: x.Fix(ctx)}
			if r.Fixed = r.Err == nil; r.Fixed {
				fixed++
			}
			if seen {
				out[i] = r
			} else {
				done[x.Name()] = len(out)
				out = append(out, r)
			}
		}
		if fixed == 0 {
			break
		}
		if found, err = c.find(o); err != nil {
			break
		}
	}
	return out, err
}

// find looks at everything, in the order in which it is to be fixed: who uses something before what is used.
func (c *Checker) find(o Options) ([]orphans.Orphan, error) {
	p := orphans.Places{State: c.State, Root: c.Root, FIFOs: o.FIFOs, Older: o.Older, Cgroups: map[string][]orphans.Task{}}
	var errs []error
	if c.Tasks != nil {
		p.Tasks = c.tasks()
		errs = append(errs, c.cgroups(p.Cgroups))
	}
	if c.Sandboxes != nil {
		if all, has := c.Sandboxes(); has {
			p.Sandboxes = map[orphans.Task]bool{}
			for _, b := range all {
				p.Sandboxes[b] = true
			}
		}
	}
	out, err := p.Find()
	errs = append(errs, err)
	for _, look := range []func(Options, map[orphans.Task][]string) ([]orphans.Orphan, error){
		c.records, c.unowned, c.leases, c.containers, c.images, c.snapshots, c.content, c.recovery,
	} {
		found, err := look(o, p.Tasks)
		out, errs = append(out, found...), append(errs, err)
	}
	return out, errors.Join(errs...)
}

// mctl is a command line of mctl in a namespace.
func mctl(ns string, args ...string) string {
	all := append([]string{"mctl", "-n", ns}, args...)
	for i, a := range all {
		if a == "" || strings.ContainsAny(a, " \t\n'\"\\$`*?;&|<>()[]{}~#!") {
			all[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(all, " ")
}

// recovery says that the database is not what it was, until it is acknowledged.
func (c *Checker) recovery(Options, map[orphans.Task][]string) ([]orphans.Orphan, error) {
	r, err := c.DB.Recovery()
	if err != nil || r == nil {
		return nil, err
	}
	problem := fmt.Sprintf("it was %s at %s", r.Reason, metadata.Time(r.At).Format(time.RFC3339))
	if r.Aside != "" {
		problem += "; set aside: " + r.Aside
	}
	if n := len(r.Damage); n > 0 {
		problem += fmt.Sprintf("; damage: %s", r.Damage[0])
		if n > 1 {
			problem += fmt.Sprintf(" and %d more", n-1)
		}
	}
	if len(r.Notes) > 0 {
		problem += "; " + strings.Join(r.Notes, "; ")
	}
	problem += "; to end this lets what no record names be removed from now on"
	return []orphans.Orphan{orphans.New(Database, filepath.Join(c.Root, "metadata.db"), "", problem, func(context.Context) error {
		if err := c.DB.Acknowledge(c.Parts()...); err != nil {
			return err
		}
		c.Acknowledged()
		return nil
	})}, nil
}
