package cgroups

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/cgroups/v3/cgroup2"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// newCgroup makes a cgroup of our own with a memory limit, in which script runs. Both are gone after the test.
func newCgroup(t *testing.T, limit int64, script string) *Cgroup {
	t.Helper()
	name := fmt.Sprintf("managerd-cgroups-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	dirs := []string{filepath.Join(Root, name)}
	limitFile := "memory.max"
	if cgroups.Mode() != cgroups.Unified {
		dirs = nil
		for _, c := range []string{"memory", "freezer", "pids", "cpu", "cpuacct"} {
			if _, err := os.Stat(filepath.Join(Root, c)); err == nil {
				dirs = append(dirs, filepath.Join(Root, c, name))
			}
		}
		limitFile = "memory.limit_in_bytes"
	}
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(d); err != nil {
				t.Error(err)
			}
		})
	}
	if err := os.WriteFile(filepath.Join(dirs[0], limitFile), []byte(strconv.FormatInt(limit, 10)), 0o644); err != nil {
		t.Fatal(err)
	}
	// The shell waits for a byte, so that it is in its cgroup before it does anything.
	cmd := exec.Command("/bin/sh", "-c", "read x; "+script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{}) // one waiter: a zombie would stay in the cgroup's list
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	for _, d := range dirs {
		if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c, err := Load(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := c.Kill(ctx); err != nil {
			t.Error(err)
		}
	})
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStats(t *testing.T) {
	c := newCgroup(t, 64<<20, "exec sleep 100")
	m, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	switch m := m.(type) {
	case *v1.Metrics:
		if m.Memory.Usage.Limit != 64<<20 || m.Pids.Current == 0 || m.CPU.Usage == nil {
			t.Errorf("%v", m)
		}
	case *v2.Metrics:
		if m.Memory.UsageLimit != 64<<20 || m.Pids.Current == 0 {
			t.Errorf("%v", m)
		}
	default:
		t.Errorf("stats are a %T", m)
	}
}

func TestInterfaces(t *testing.T) {
	const dev = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:    1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
eth0:18446744073709551615 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
short: 1 2
`
	got := interfaces([]byte(dev))
	if len(got) != 2 || got[0].name != "lo" || got[0].n[15] != 16 || got[1].name != "eth0" || got[1].n[0] != 1<<64-1 {
		t.Errorf("%v", got)
	}
}

// TestLimits: which cgroup's limit was hit, of one and of that which it is in.
func TestLimits(t *testing.T) {
	base, limit := filepath.Join(Root, "memory"), "memory.limit_in_bytes"
	if cgroups.Mode() == cgroups.Unified {
		base, limit = Root, "memory.max"
	}
	for _, c := range []struct {
		name        string
		outer, mine int64
		level       Level
		path        string
	}{
		{"own", 256 << 20, 32 << 20, LevelOwn, "/inner"},
		{"ancestor", 32 << 20, 256 << 20, LevelAbove, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := fmt.Sprintf("/managerd-limits-test-%d-%s", os.Getpid(), c.name)
			outer := filepath.Join(base, name)
			inner := filepath.Join(outer, "inner")
			mkdir := func(dir string, bytes int64) {
				t.Helper()
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := os.Remove(dir); err != nil {
						t.Error(err)
					}
				})
				if err := os.WriteFile(filepath.Join(dir, limit), []byte(strconv.FormatInt(bytes, 10)), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			mkdir(outer, c.outer)
			if base == Root {
				if err := os.WriteFile(filepath.Join(outer, "cgroup.subtree_control"), []byte("+memory"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			mkdir(inner, c.mine)
			cg := &Cgroup{path: inner, any: inner}
			if base == Root {
				cg.v2 = &cgroup2.Manager{}
			} else {
				var err error
				if cg, err = loadV1(map[string]string{"memory": inner}); err != nil {
					t.Fatal(err)
				}
			}
			l := cg.Limits()
			if level, path := l.Hit(); level != LevelMachine || path != "" {
				t.Errorf("before: %q, %q", level, path)
			}
			cmd := exec.Command("/bin/sh", "-c", "echo $$ > "+inner+"/cgroup.procs && exec tail /dev/zero")
			if out, err := cmd.CombinedOutput(); err == nil || len(out) > 0 {
				t.Fatalf("%v: %s", err, out)
			}
			if level, path := l.Hit(); level != c.level || path != name+c.path {
				t.Errorf("%q, %q", level, path)
			}
			if level, _ := l.Hit(); level != LevelMachine {
				t.Errorf("once more: %q", level)
			}
		})
	}
	if level, path := (*Cgroup)(nil).Limits().Hit(); level != LevelUnknown || path != "" {
		t.Errorf("of none: %q, %q", level, path)
	}
}

func TestOOM(t *testing.T) {
	// The shell survives, its child, which grows without end, does not.
	c := newCgroup(t, 32<<20, "sleep 0.2; tail /dev/zero; exit 5")
	kills := make(chan uint64, 10)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := c.WatchOOM(ctx, func(n uint64) { kills <- n }); err != nil {
		t.Fatal(err)
	}
	select {
	case n := <-kills:
		if n == 0 {
			t.Error("no kills counted")
		}
	case <-time.After(60 * time.Second):
		t.Fatal("no OOM reported")
	}
	if n, err := c.OOMKills(); err != nil || n == 0 {
		t.Errorf("%d kills, %v", n, err)
	}
}

func TestKill(t *testing.T) {
	c := newCgroup(t, 64<<20, "for i in 1 2 3 4 5; do (setsid sleep 1000 &) ; done; exec sleep 1000")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := c.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if pids, err := c.Pids(); err != nil || len(pids) != 0 {
		t.Errorf("left: %v, %v", pids, err)
	}
}

func TestGone(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(cmd.ProcessState.Pid()); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

// TestZombie: of a process that has ended and waits for its parent, version 1 says that it is in the root cgroup. That
// is not its own: whoever counts or kills there hits the whole machine.
func TestZombie(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	c, err := Load(cmd.Process.Pid)
	if cgroups.Mode() == cgroups.Unified {
		return // there it says the truth
	}
	if !errdefs.IsNotFound(err) {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestBlind loads cgroups with a mountinfo that says nothing, the worst of the reads that miss lines: in a process of its
// own, which covers it in a mount namespace of its own.
func TestBlind(t *testing.T) {
	const env = "MANAGERD_CGROUPS_BLIND"
	pid := os.Getenv(env)
	if pid == "" {
		c := newCgroup(t, 64<<20, "exec sleep 100")
		pids, err := c.Pids()
		if err != nil || len(pids) != 1 {
			t.Fatalf("%v, %v", pids, err)
		}
		cmd := exec.Command("unshare", "-m", "sh", "-ec",
			"mount --bind /dev/null /proc/$$/mountinfo; exec \"$0\" -test.run='^TestBlind$' -test.v", os.Args[0])
		cmd.Env = append(os.Environ(), env+"="+strconv.Itoa(pids[0]))
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "blind: 64 MiB") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	if data, err := os.ReadFile("/proc/self/mountinfo"); err != nil || len(data) > 0 {
		t.Fatalf("mountinfo is not covered: %d bytes, %v", len(data), err)
	}
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Load(n)
	if err != nil {
		t.Fatal(err)
	}
	dirs := map[string]string{"": c.path}
	if c.v1 != nil {
		dirs = map[string]string{"memory": c.path}
	}
	at, err := At(dirs)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*Cgroup{c, at} {
		m, err := c.Stats()
		if err != nil {
			t.Fatal(err)
		}
		var limit uint64
		switch m := m.(type) {
		case *v1.Metrics:
			limit = m.Memory.Usage.Limit
		case *v2.Metrics:
			limit = m.Memory.UsageLimit
		}
		if limit != 64<<20 {
			t.Errorf("the limit is %d: %v", limit, m)
		}
		if err := c.WatchOOM(t.Context(), func(uint64) {}); err != nil {
			t.Error(err)
		}
	}
	t.Log("blind: 64 MiB")
}
