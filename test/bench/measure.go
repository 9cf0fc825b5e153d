package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	shimpb "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// execs is how many programs are started in each container.
const execs = 3

// warming is how many containers each side makes before its times count: page cache, heap and connections are warm then.
const warming = 2

// measureContainers lets both sides make, use and delete containers in turn. Who is first changes with every pair.
func measureContainers(ctx context.Context, r *report, sides []*side, pairs int, seccomp bool) error {
	title, tag := "Without a seccomp profile (ctr's default)", "plain"
	if seccomp {
		title, tag = "With the default seccomp profile (nerdctl's, docker's and the kubelet's RuntimeDefault)", "seccomp"
	}
	sec := r.section(title)
	for i := range warming + pairs {
		into := sec
		if i < warming {
			into = &section{}
		}
		for k := range sides {
			who := (i + k) % len(sides)
			if err := sides[who].life(ctx, fmt.Sprintf("%s-%d", tag, i), seccomp, func(row, unit string, v float64) {
				into.add(row, unit, who, v)
			}); err != nil {
				return fmt.Errorf("%s: %w", sides[who].name, err)
			}
		}
	}
	r.print(sec)
	return nil
}

// life is one container's, from its snapshot to its removal.
func (s *side) life(ctx context.Context, id string, seccomp bool, note func(row, unit string, v float64)) error {
	const ms = "ms"
	took := func(fn func() error) (wall, cpu float64, err error) {
		before, err := s.cpu.used()
		if err != nil {
			return 0, 0, err
		}
		began := time.Now()
		if err := fn(); err != nil {
			return 0, 0, err
		}
		wall = milliseconds(time.Since(began))
		after, err := s.cpu.used()
		return wall, milliseconds(after - before), err
	}
	began := time.Now()
	mounts, err := s.record(ctx, id, seccomp)
	if err != nil {
		return err
	}
	wall, cpu, err := took(func() error { return s.run(ctx, id, mounts) })
	if err != nil {
		return err
	}
	note("snapshot, record, create, start", ms, milliseconds(time.Since(began)))
	note("create + start", ms, wall)
	s.noteCPU(note, "create + start, CPU", cpu)
	var lines strings.Builder
	for i := range execs {
		execID := fmt.Sprintf("e%d", i)
		var started time.Duration
		wall, cpu, err := took(func() error {
			began := time.Now()
			return s.exec(ctx, id, execID, func() { started = time.Since(began) })
		})
		if err != nil {
			return err
		}
		note("exec, until it runs", ms, milliseconds(started))
		note("exec, until its exit is known", ms, wall)
		s.noteCPU(note, "exec, CPU", cpu)
		if err := s.deleteExec(ctx, id, execID); err != nil {
			return err
		}
		lines.WriteString(execID + "\n")
	}
	if s.phases {
		if err := s.notePhases(ctx, id, note); err != nil {
			return err
		}
	}
	if wall, _, err = took(func() error { return s.kill(ctx, id) }); err != nil {
		return err
	}
	note("kill, until its exit is known", ms, wall)
	if wall, cpu, err = took(func() error { return s.remove(ctx, id) }); err != nil {
		return err
	}
	note("delete", ms, wall)
	s.noteCPU(note, "delete, CPU", cpu)
	if err := s.wrote(id, lines.String()); err != nil {
		return err
	}
	return s.forget(ctx, id)
}

// notePhases asks the shim itself how long the parts of the last create, start and exec took.
func (s *side) notePhases(ctx context.Context, id string, note func(row, unit string, v float64)) error {
	shim, err := shimapi.Dial(ctx, shimapi.BootstrapParams{Version: 3, Address: shimapi.SocketPath(s.home.State(), s.home.Namespace, id)})
	if err != nil {
		return err
	}
	defer func() { _ = shim.Close() }()
	d, err := shim.Shim().Describe(ctx, &shimpb.DescribeRequest{})
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(d.Timings)) {
		note("of that in the shim: "+name, "ms", milliseconds(time.Duration(d.Timings[name])))
	}
	return nil
}

func (s *side) noteCPU(note func(row, unit string, v float64), row string, v float64) {
	if s.cpu != "" {
		note(row, "ms", v)
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// measureMany runs many containers on each side at once, weighs their shims, and restarts the daemons above them.
func measureMany(ctx context.Context, r *report, sides []*side, o options) error {
	sec := r.section(fmt.Sprintf("%d containers at once", o.containers))
	ids := make([]string, o.containers)
	for i := range ids {
		ids[i] = fmt.Sprintf("many-%d", i)
		for _, s := range sides {
			mounts, err := s.record(ctx, ids[i], false)
			if err == nil {
				err = s.run(ctx, ids[i], mounts)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	for who, s := range sides {
		pids, err := s.pids(ctx)
		if err != nil {
			return err
		}
		if len(pids) != len(ids) {
			return fmt.Errorf("%s runs %d containers, not %d", s.name, len(pids), len(ids))
		}
		for _, id := range ids {
			shim, err := parent(pids[id])
			if err != nil {
				return err
			}
			m, err := weigh(shim)
			if err != nil {
				return err
			}
			sec.add("memory per shim, PSS", "kB", who, m.pss)
			sec.add("memory per shim, private dirty", "kB", who, m.privateDirty)
			sec.add("threads per shim", "", who, m.threads)
		}
		m, err := weigh(s.program.PID())
		if err != nil {
			return err
		}
		sec.add("memory of the daemon, RSS", "kB", who, m.rss)
	}
	for i := range o.restarts {
		for k := range sides {
			who := (i + k) % len(sides)
			s := sides[who]
			if err := s.stop(); err != nil {
				return fmt.Errorf("cannot stop %s: %w", s.name, err)
			}
			began := time.Now()
			served, err := s.start(ctx)
			if err != nil {
				return err
			}
			sec.add("daemon's start, until it answers", "ms", who, milliseconds(served))
			for {
				pids, err := s.pids(ctx)
				if err != nil {
					return err
				}
				if len(pids) == len(ids) {
					break
				}
				if time.Since(began) > answering {
					return fmt.Errorf("%s finds %d of %d containers again", s.name, len(pids), len(ids))
				}
			}
			sec.add("daemon's start, until all are listed", "ms", who, milliseconds(time.Since(began)))
			m, err := weigh(s.program.PID())
			if err != nil {
				return err
			}
			sec.add("memory of the restarted daemon, RSS", "kB", who, m.rss)
		}
	}
	for _, id := range ids {
		for who, s := range sides {
			began := time.Now()
			if err := s.kill(ctx, id); err != nil {
				return err
			}
			if err := s.remove(ctx, id); err != nil {
				return err
			}
			sec.add("kill and delete, after that", "ms", who, milliseconds(time.Since(began)))
			if err := s.forget(ctx, id); err != nil {
				return err
			}
		}
	}
	r.print(sec)
	return nil
}
