package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"
)

// puller is a client with what it asks: it pulls, imports and removes images, and is made of commands as a user types them.
type puller struct {
	name                 string
	pull, load, unwanted func(s *specimen) []string
	daemon               *side // nil: there is none
}

func (s *side) puller(tool string) *puller {
	at := []string{tool, "-a", s.home.Socket(), "-n", s.home.Namespace, "images"}
	say := func(args ...string) []string { return append(at[:len(at):len(at)], args...) }
	return &puller{
		name: s.name, daemon: s,
		pull:     func(i *specimen) []string { return say("pull", "--plain-http", "--snapshotter", "overlayfs", i.ref) },
		load:     func(i *specimen) []string { return say("import", "--snapshotter", "overlayfs", i.archive) },
		unwanted: func(i *specimen) []string { return say("rm", "--sync", i.ref) },
	}
}

// podman keeps its images below dir.
func podman(dir string) *puller {
	say := func(args ...string) []string {
		return append([]string{"podman", "--root", filepath.Join(dir, "podman"), "--runroot", filepath.Join(dir, "podman-run"), "--storage-driver", "overlay"}, args...)
	}
	return &puller{
		name:     "podman",
		pull:     func(i *specimen) []string { return say("pull", "--quiet", "--tls-verify=false", i.ref) },
		load:     func(i *specimen) []string { return say("load", "--quiet", "--input", i.archive) },
		unwanted: func(i *specimen) []string { return say("rmi", "--all", "--force") },
	}
}

// measureImages lets managerd and each of the others found here pull and import the same images in turn, from a registry on
// loopback.
func measureImages(ctx context.Context, r *report, sides []*side, o options) (err error) {
	d, err := newDepot(ctx)
	defer func() { err = errors.Join(err, d.close()) }()
	if err != nil {
		return err
	}
	var images []*specimen
	for _, i := range []struct {
		name         string
		layers, size int
	}{{"many", 40, 4 << 20}, {"one", 1, 256 << 20}} {
		s, err := d.put(ctx, i.name, i.layers, i.size)
		if err != nil {
			return fmt.Errorf("cannot make an image: %w", err)
		}
		images = append(images, s)
	}
	if err := forget(); err != nil {
		return err
	}
	ours := sides[0].puller(filepath.Join(sides[0].home.Bin, "mctl"))
	var others []*puller
	if len(sides) == 2 {
		tool := "ctr"
		if o.against != "" {
			tool = filepath.Join(sides[1].home.Bin, "mctl")
		}
		others = append(others, sides[1].puller(tool))
		if _, err := exec.LookPath("podman"); err == nil && o.against == "" {
			others = append(others, podman(d.dir))
		}
	}
	if len(others) == 0 {
		others = append(others, nil)
	}
	for _, i := range images {
		for _, other := range others {
			pair := []*puller{ours}
			sec := r.section("Pull and import: an image of " + i.title)
			if other != nil {
				pair = append(pair, other)
				sec.sides = []string{ours.name, other.name}
			}
			if err := measurePulls(ctx, sec, pair, i, o.pulls); err != nil {
				return err
			}
			r.print(sec)
		}
	}
	return nil
}

// forget gives the memory back that the making of images took: the peak of a child begins with that of its parent.
func forget() error {
	debug.FreeOSMemory()
	return os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
}

func measurePulls(ctx context.Context, sec *section, pair []*puller, i *specimen, rounds int) error {
	for round := range 1 + rounds { // the first warms the page cache
		into := sec
		if round == 0 {
			into = &section{}
		}
		for k := range pair {
			who := (round + k) % len(pair)
			p := pair[who]
			for _, job := range []struct {
				name string
				args []string
			}{{"pull and unpack", p.pull(i)}, {"import and unpack", p.load(i)}} {
				u, err := p.run(ctx, job.args)
				if err != nil {
					return err
				}
				into.add(job.name, "ms", who, u.wall)
				into.add(job.name+", CPU", "ms", who, u.cpu)
				into.add(job.name+", peak memory", "kB", who, u.peak)
				if _, err := p.run(ctx, p.unwanted(i)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// expense is what a command and the daemon behind it took: milliseconds, and kB.
type expense struct{ wall, cpu, peak float64 }

func (p *puller) run(ctx context.Context, args []string) (e expense, err error) {
	before, daemon := time.Duration(0), 0
	if p.daemon != nil {
		daemon = p.daemon.program.PID()
		if before, err = p.daemon.cpu.used(); err != nil {
			return e, err
		}
		// From here on VmHWM is the peak of this command (proc(5), clear_refs).
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", daemon), []byte("5"), 0); err != nil {
			return e, err
		}
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return e, fmt.Errorf("%s: %w\n%s", cmd, err, tail(out.Bytes()))
	}
	e.wall = milliseconds(time.Since(began))
	e.cpu = milliseconds(cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime())
	e.peak = float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
	if p.daemon != nil {
		after, err := p.daemon.cpu.used()
		if err != nil {
			return e, err
		}
		peak, err := peakOf(daemon)
		if err != nil {
			return e, err
		}
		e.cpu += milliseconds(after - before)
		e.peak += peak
	}
	return e, nil
}

func tail(b []byte) []byte { return b[max(0, len(b)-2000):] }
