package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/test/harness"
)

// monkey makes faults, one after the other; some last while it goes on.
type monkey struct {
	d *harness.Daemon
	j *journal
	r *rand.Rand

	under sync.WaitGroup // what lasts
}

// victim is the shim of a container.
type victim struct {
	pid, pidfd int
	id         string
}

func (v *victim) signal(sig unix.Signal) error { return unix.PidfdSendSignal(v.pidfd, sig, nil, 0) }
func (v *victim) close()                       { _ = unix.Close(v.pidfd) }

// victims are the shims that keep a container; which, wanted says. The caller closes them.
func (m *monkey) victims(wanted func(id string) bool) (all []*victim) {
	for _, pid := range m.d.Shims() {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		// Behind the pidfd: the number is that of the process that is killed.
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		f := strings.Split(strings.TrimRight(string(data), "\x00"), "\x00")
		i, verb := slices.Index(f, "-id"), f[len(f)-1]
		// What a shim has just forked has its command line, but is in its session.
		if sid, serr := unix.Getsid(pid); serr != nil || sid != pid {
			err = errors.Join(err, fs.ErrNotExist)
		}
		if err != nil || !strings.Contains(string(data), m.d.Dir) || i < 0 || i+1 >= len(f) || !wanted(f[i+1]) ||
			verb != shimapi.VerbServe && verb != shimapi.VerbAdopt {
			_ = unix.Close(fd)
			continue
		}
		all = append(all, &victim{pid: pid, pidfd: fd, id: f[i+1]})
	}
	slices.SortFunc(all, func(a, b *victim) int { return strings.Compare(a.id, b.id) })
	return all
}

// choose picks a shim, every second time one of a ticker; nil when there is none. The caller closes it.
func (m *monkey) choose() *victim {
	ticker := m.r.IntN(2) == 0
	all := m.victims(func(id string) bool { return !ticker || strings.HasPrefix(id, "ticker") })
	at := m.r.IntN(1 << 16) // as many numbers are used, whoever lives
	if len(all) == 0 {
		return nil
	}
	v := all[at%len(all)]
	for _, other := range all {
		if other != v {
			other.close()
		}
	}
	return v
}

// faults are what may happen, each as often as its weight says.
var faults = []struct {
	weight int
	make   func(*monkey) error
}{
	{20, (*monkey).killDaemon}, {35, (*monkey).killShim}, {10, (*monkey).killBoth}, {15, (*monkey).stopShim}, {20, (*monkey).upgrade},
}

func (m *monkey) fault() error {
	total := 0
	for _, f := range faults {
		total += f.weight
	}
	n := m.r.IntN(total)
	for _, f := range faults {
		if n -= f.weight; n < 0 {
			return f.make(m)
		}
	}
	return nil
}

func (m *monkey) killDaemon() error {
	m.j.did("daemon killed", "")
	return m.without(func() {})
}

// without kills the daemon, does something, and starts the next one after a while.
func (m *monkey) without(fn func()) error {
	away, hurry := time.Duration(m.r.IntN(300))*time.Millisecond, m.r.IntN(5) == 0
	m.j.wentDown(time.Now())
	if err := m.d.Kill(); err != nil {
		return err
	}
	fn()
	time.Sleep(away)
	begin := time.Now()
	if err := m.d.Spawn(); err != nil {
		return err
	}
	if hurry { // the next fault meets it while it starts
		return nil
	}
	return m.ready(begin)
}

// ready waits until the daemon that was started at begin serves.
func (m *monkey) ready(begin time.Time) error {
	if err := m.d.Ready(harness.Starting); err != nil {
		return err
	}
	m.j.cameUp()
	m.j.timed("daemon started to serving", time.Since(begin))
	return nil
}

func (m *monkey) kill(v *victim) {
	m.j.killedShim(v.id, time.Now())
	_ = v.signal(unix.SIGKILL) // one that is gone has ended by itself
}

func (m *monkey) killShim() error {
	v := m.choose()
	if v == nil {
		return nil
	}
	defer v.close()
	m.j.did("shim killed", "of %s, pid %d", v.id, v.pid)
	begin := time.Now()
	m.kill(v)
	if strings.HasPrefix(v.id, "ticker") {
		m.under.Go(func() { m.succeeded(v.id, v.pid, begin) })
	}
	return nil
}

// succeeded times a successor, if one comes before the next fault spoils it.
func (m *monkey) succeeded(id string, pid int, begin time.Time) {
	for time.Since(begin) < successor {
		if d, err := m.describe(id); err == nil && int(d.Pid) != pid {
			m.j.timed("shim killed to successor answering", time.Since(begin))
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// describe asks a shim itself.
func (m *monkey) describe(id string) (*shim.DescribeResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), successor)
	defer cancel()
	c, err := shimapi.Dial(ctx, shimapi.BootstrapParams{Version: 3, Address: "unix://" + shimapi.SocketPath(m.d.State(), m.d.Namespace, id)})
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	return c.Shim().Describe(ctx, &shim.DescribeRequest{})
}

func (m *monkey) killBoth() error {
	v := m.choose()
	first, between := m.r.IntN(2) == 0, time.Duration(m.r.IntN(30))*time.Millisecond
	if v == nil {
		return nil
	}
	defer v.close()
	m.j.did("shim and daemon killed", "of %s, pid %d, shim first: %t, %s between", v.id, v.pid, first, between)
	if first {
		m.kill(v)
		time.Sleep(between)
		return m.without(func() {})
	}
	return m.without(func() {
		time.Sleep(between)
		m.kill(v)
	})
}

func (m *monkey) stopShim() error {
	v := m.choose()
	long := time.Duration(m.r.IntN(1500)) * time.Millisecond
	if v == nil {
		return nil
	}
	m.j.did("shim stopped", "of %s, pid %d, for %s", v.id, v.pid, long)
	_ = v.signal(unix.SIGSTOP)
	m.under.Go(func() {
		defer v.close()
		time.Sleep(long)
		_ = v.signal(unix.SIGCONT)
	})
	return nil
}

// upgrade replaces the code of a shim. It may be busy, stopped, killed by the next fault, or at its end: then it goes on, or
// has a successor, as it would without.
func (m *monkey) upgrade() error {
	v := m.choose()
	if v == nil {
		return nil
	}
	v.close()
	m.j.did("upgrade asked for", "of %s, pid %d", v.id, v.pid)
	m.under.Go(func() {
		out, err := harness.Output(m.d.Mctl("shim", "upgrade", v.id, "--state", m.d.State(), "--timeout", "10s", "-o", "json"))
		var rows []struct {
			Pause int64  `json:"pause_ns"`
			Error string `json:"error"`
		}
		if json.Unmarshal([]byte(out), &rows) == nil && len(rows) == 1 && rows[0].Error == "" {
			m.j.timed("upgrade, pause", time.Duration(rows[0].Pause))
			return
		}
		if len(rows) == 1 && rows[0].Error != "" {
			err = errors.New(rows[0].Error)
		}
		m.j.did("upgrade not made", "of %s: %v", v.id, err)
	})
	return nil
}

// keep copies what is needed to understand a failure to a directory that stays: bundles with their ledgers and black boxes,
// the daemon's log, and the journal. `mctl shim --state DIR/state -n NAMESPACE` reads them.
func keep(d *harness.Daemon) (string, error) {
	dir, err := os.MkdirTemp("", "managerd-chaos-failed-")
	if err != nil {
		return "", err
	}
	files, _ := filepath.Glob(filepath.Join(d.Dir, "p*")) // outputs of TestFailpoints
	for _, f := range append(files, filepath.Join(d.Dir, "managerd.log"), filepath.Join(d.Dir, "chaos.log")) {
		if i, err := os.Stat(f); err != nil || !i.Mode().IsRegular() {
			continue
		}
		if data, err := os.ReadFile(f); err == nil {
			_ = os.WriteFile(filepath.Join(dir, filepath.Base(f)), data, 0o600)
		}
	}
	bundles, _ := filepath.Glob(filepath.Join(d.State(), "io.containerd.runtime.v2.task", d.Namespace, "*"))
	for _, b := range bundles {
		for _, pattern := range []string{"ledger", "blackbox", "events.cursor", "bootstrap.json", "stacks", "table/*", "table/.init", "runc/*/state.json"} {
			files, _ := filepath.Glob(filepath.Join(b, pattern))
			for _, f := range files {
				rel, _ := filepath.Rel(filepath.Dir(b), f)
				to := filepath.Join(dir, "state", "io.containerd.runtime.v2.task", d.Namespace, rel)
				_ = os.MkdirAll(filepath.Dir(to), 0o700)
				if data, err := os.ReadFile(f); err == nil {
					_ = os.WriteFile(to, data, 0o600)
				}
			}
		}
	}
	return dir, nil
}

// descriptors is how many a process has open.
func descriptors(pid int) int {
	entries, _ := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
	return len(entries)
}
