// Package shimtest is a conformance suite for containerd shims: it takes any shim *binary*, boots it by containerd's
// contract, drives its task API with real containers made of the machine's static busybox, serves the event socket that a
// daemon would, and looks at the end for what was left behind. It knows no shim from inside.
//
// Every expectation has a key, such as "pause/state". A shim that is known to differ says so in Config.Known, with the
// reason; the suite then insists on the difference, so that the list never outlives its cause.
//
// It needs root, /bin/busybox (Debian: busybox-static) and cgroups.
package shimtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/shimapi"
)

// Config says which shim is tested.
type Config struct {
	// Binary is the absolute path of the shim.
	Binary string
	// Options are the runtime options of every Create, or nil.
	Options *anypb.Any
	// Known are the expectations that this shim does not meet: the key, which may be a pattern of path.Match, and the
	// reason. Every expectation that matches must fail, and at least one must match.
	Known map[string]string
}

// patience is how long one request, or one thing that is to happen, may take on a busy machine.
const patience = 20 * time.Second

// form is a way to boot a shim and to talk to it.
type form struct {
	name    string
	env     []string
	serve   bool // our own: the socket is handed over as a descriptor
	version int  // of the task API
	sandbox bool // it is to keep a sandbox
}

// suite is one run over a binary.
type suite struct {
	cfg    Config
	dir    string
	rootfs string

	mu   sync.Mutex
	n    int             // of shims
	held map[string]bool // known differences that were seen
}

// cases are what is tested, in every form.
var cases = []struct {
	name string
	run  func(*shim)
}{
	{"boot", bootCase},
	{"life", lifeCase},
	{"kill", killCase},
	{"kill created", killCreatedCase},
	{"init killed", initKilledCase},
	{"host pid namespace", hostPIDCase},
	{"pause", pauseCase},
	{"stats and update", statsCase},
	{"update with nothing", updateNothingCase},
	{"checkpoint", checkpointCase},
	{"no checkpoint", noCheckpointCase},
	{"shutdown", shutdownCase},
	{"create fails", createFailsCase},
	{"exec", execCase},
	{"exec fails", execFailsCase},
	{"exec signals", execSignalsCase},
	{"exec statuses", execStatusesCase},
	{"execs end with init", execsEndCase},
	{"output", outputCase},
	{"input", inputCase},
	{"terminal", terminalCase},
	{"exec terminal", execTerminalCase},
	{"illegal absent", illegalAbsentCase},
	{"illegal created", illegalCreatedCase},
	{"illegal running", illegalRunningCase},
	{"illegal paused", illegalPausedCase},
	{"illegal stopped", illegalStoppedCase},
	{"illegal deleted", illegalDeletedCase},
	{"illegal execs", illegalExecsCase},
	{"sigterm", sigtermCase},
	{"shim killed", shimKilledCase},
	{"shim killed after exit", shimKilledAfterExitCase},
	{"delete of nothing", deleteNothingCase},
}

// Run tests a shim; under -short with fewer execs.
func Run(t *testing.T, cfg Config) {
	dir, err := os.MkdirTemp("", "shimtest-") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	s := &suite{cfg: cfg, dir: dir, rootfs: filepath.Join(dir, "rootfs"), held: map[string]bool{}}
	t.Cleanup(func() {
		left := append(mountsBelow(dir), cgroupsLeft()...)
		if len(left) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			return // nothing is removed through a mount
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	Rootfs(t, s.rootfs)
	forms := s.forms(t)
	for _, f := range forms {
		t.Run(f.name, func(t *testing.T) {
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) { s.with(t, f, c.run) })
			}
		})
	}
	s.sandboxes(t, forms)
	if !t.Failed() { // else not everything was asked
		s.checkKnown(t)
	}
}

// forms asks the shim which it has.
func (s *suite) forms(t *testing.T) []form {
	t.Helper()
	found := []form{{name: "start v2", version: 2}}
	v3 := form{name: "start v3", env: []string{"MAX_SHIM_VERSION=3"}, version: 3}
	t.Run("announced", func(t *testing.T) {
		s.with(t, form{name: "announced", env: v3.env}, func(sh *shim) {
			sh.expect("start/v3", sh.params.Version == 3, "a daemon that knows version 3 is answered %q", sh.printed)
			if sh.params.Version == 3 {
				found = append(found, v3)
			}
		})
		out, err := exec.Command(s.cfg.Binary, "-info").Output()
		about := &types.RuntimeInfo{}
		if err == nil {
			err = proto.Unmarshal(out, about)
		}
		s.expect(t, "info", err == nil, "-info: %v", err)
		if about.Annotations[shimapi.AnnotationServe] != "" {
			found = append(found, form{name: "serve", serve: true, version: 3})
		}
	})
	return found
}

// expect is how everything is judged.
func (s *suite) expect(t testing.TB, key string, ok bool, format string, args ...any) {
	t.Helper()
	known := s.known(key)
	switch {
	case known == "" && !ok:
		t.Errorf("%s: %s", key, fmt.Sprintf(format, args...))
	case known != "" && ok:
		t.Errorf("%s: it holds, which contradicts the known difference %q: %s", key, known, s.cfg.Known[known])
	case known != "":
		t.Logf("%s: known difference (%s): %s", key, s.cfg.Known[known], fmt.Sprintf(format, args...))
		s.mu.Lock()
		s.held[known] = true
		s.mu.Unlock()
	}
}

// known is the entry of Config.Known that a key matches: the key itself before patterns.
func (s *suite) known(key string) string {
	if _, ok := s.cfg.Known[key]; ok {
		return key
	}
	for pattern := range s.cfg.Known {
		if ok, err := path.Match(pattern, key); err == nil && ok {
			return pattern
		}
	}
	return ""
}

// settles is expect for what takes a moment to become true.
func (s *suite) settles(t testing.TB, key string, ok func() bool, format string, args ...any) bool {
	t.Helper()
	within := patience
	if s.known(key) != "" {
		within = time.Second // it is not going to
	}
	done := until(within, ok)
	s.expect(t, key, done, format, args...)
	return done
}

// checkKnown fails for differences that were not met with.
func (s *suite) checkKnown(t *testing.T) {
	t.Helper()
	var unseen []string
	for key := range s.cfg.Known {
		if !s.held[key] {
			unseen = append(unseen, key)
		}
	}
	sort.Strings(unseen)
	for _, key := range unseen {
		t.Errorf("known difference %q was not seen: nothing has that key", key)
	}
}

// eventually polls for what tells nobody when it happens.
func eventually(ok func() bool) bool { return until(patience, ok) }

func until(within time.Duration, ok func() bool) bool {
	for deadline := time.Now().Add(within); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// within bounds one request.
func within() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

// timedOut tells a request that was not answered from one that was refused.
func timedOut(err error) bool { return errors.Is(err, context.DeadlineExceeded) }
