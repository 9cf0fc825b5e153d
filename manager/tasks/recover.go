package tasks

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/shimapi/failpoint"
)

const (
	// connecting is how long connecting to a shim may take: the kernel accepts, even for one that is stopped.
	connecting = 5 * time.Second
	// succeeding is how long the successor of a dead shim may take.
	succeeding = 20 * time.Second
	// rejoining is how long an endpoint that is gone is waited for.
	rejoining = 10 * time.Second
	// again is how long to wait before an event stream that broke is opened anew.
	again = time.Second
)

// Recover enters every task that has a bundle. Whether their shims live is found out by Adopt; a request for a task has that
// task looked at first. To be called once, before the service is used.
func (s *Service) Recover() error {
	found, err := s.bundles.List()
	if err != nil {
		return err
	}
	s.mu.Lock()
	for _, b := range found {
		t := newTask(key{b.Namespace, b.ID})
		t.found, t.heard = b, make(chan struct{})
		t.adopt = func() {
			if !s.adopt(t, b) {
				close(t.heard)
			}
			if b.Doomed() {
				_ = s.background(func() { s.removeDoomed(t) }) // a daemon that is ending leaves it to the next one
			}
		}
		s.tasks[t.key] = t
	}
	s.mu.Unlock()
	s.shims.UnparkOthers(func(ns, id string) bool { // nobody makes a task yet
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.tasks[key{ns, id}] != nil
	})
	return nil
}

// follow hands on what our own shim tells, from where the last daemon stopped, until the shim ends. A connection that
// breaks is made anew; a shim that is dead leaves remains.
func (s *Service) follow(t *Task, b *bundle.Bundle, shim *shims.Shim) {
	log := s.log.With("namespace", b.Namespace, "id", b.ID)
	err := s.background(func() {
		defer close(t.followed)
		source := b.Source()
		since := max(b.Cursor(), s.events.Cursor(source))
		var died, broke deaths
		defer func() {
			if shim.Own && s.ctx.Err() == nil {
				s.catchUp(b, source, s.read(b).events) // it may have ended before it could hand over the last ones
			}
		}()
		for {
			err := s.stream(t, b, source, shim, &since)
			if s.ctx.Err() != nil || (err == nil && t.endExpected()) {
				return
			}
			if err != nil && !isClosed(shim.Gone()) {
				log.Warn("the event stream of a shim broke", "error", err)
				select {
				case <-time.After(again):
				case <-shim.Gone():
				case <-s.ctx.Done():
					return
				}
				continue
			}
			next, aerr := s.reconnect(t, b)
			if aerr == nil {
				log.Warn("the connection to a shim broke, and was made anew", "error", err)
				shim.Close()
				shim = next
				t.settle(shim, nil)
				wait, _ := broke.count(time.Now(), since) // one that breaks every connection is kept all the same
				if s.pause(min(wait, again)) {
					return
				}
				continue
			}
			if s.ctx.Err() != nil || t.endExpected() {
				return
			}
			log.Error("a shim has died", "error", errors.Join(err, aerr))
			shim.Close()
			if next := s.succession(b, &died, since); next != nil {
				shim = next
				t.settle(shim, nil)
				continue
			}
			if s.ctx.Err() != nil {
				return
			}
			if !s.bequeath(t, b) {
				s.finish(t, b)
			}
			return
		}
	})
	if err != nil {
		close(t.followed)
	}
}

// reconnect connects to the shim of a task again. An endpoint has some time: who serves it may be about to replace it.
func (s *Service) reconnect(t *Task, b *bundle.Bundle) (*shims.Shim, error) {
	deadline := time.Now().Add(rejoining)
	for {
		ctx, cancel := context.WithTimeout(s.in(b.Namespace), connecting)
		next, err := s.shims.Adopt(ctx, b)
		if err == nil && !s.serves(ctx, next) {
			next.Close()
			next, err = s.shims.Adopt(ctx, b)
		}
		cancel()
		if err == nil || !b.Joined() || t.endExpected() || time.Now().After(deadline) || s.pause(again/4) {
			return next, err
		}
	}
}

// serves says whether a connection that was made anew holds: the socket of a shim that is just dying takes one, too, which
// then breaks. One whose shim is silent does.
func (s *Service) serves(ctx context.Context, shim *shims.Shim) bool {
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	_, err := state(ctx, shim, shim.Bundle.ID, "")
	return err == nil || !lost(shim, err)
}

// succession starts a successor of a dead shim of ours, if that kept a task; one that dies while it takes over is followed by
// another, within the limits of deaths. since is the last event that was told. nil: there is nothing to be kept, or it cannot
// be; then what the dead one has left is all there is.
func (s *Service) succession(b *bundle.Bundle, died *deaths, since uint64) *shims.Shim {
	for {
		if l := s.read(b); s.ctx.Err() != nil || !l.remains.own || !l.made || l.deleted || l.remains.pid == 0 && !l.waits {
			return nil
		}
		wait, more := died.count(time.Now(), since)
		if !more {
			s.log.Error("the successors of a shim die again and again; its task is left without one until the next start of the daemon",
				"namespace", b.Namespace, "id", b.ID, "deaths", maxDeaths, "within", deathsWithin)
			return nil
		}
		if s.pause(wait) {
			return nil
		}
		if shim := s.succeed(b); shim != nil {
			return shim
		}
	}
}

// succeed starts a successor; nil when that has failed.
func (s *Service) succeed(b *bundle.Bundle) *shims.Shim {
	ctx, cancel := context.WithTimeout(s.in(b.Namespace), succeeding)
	defer cancel()
	shim, err := s.shims.Succeed(ctx, b)
	if err != nil {
		s.log.Error("no successor could take over from a dead shim", "namespace", b.Namespace, "id", b.ID, "error", err)
		return nil
	}
	return shim
}

// stream hands on events until the shim has shut down (nil), or the stream breaks.
func (s *Service) stream(t *Task, b *bundle.Bundle, source string, shim *shims.Shim, since *uint64) error {
	if !shim.Own { // it forwards its events
		select {
		case <-shim.Gone():
		case <-s.ctx.Done():
		}
		return nil
	}
	hand := func(e *shims.Event) {
		if e.Seq > *since {
			*since = e.Seq
			s.hand(b, source, e)
		}
	}
	err := shim.Follow(s.in(b.Namespace), *since, hand)
	if errdefs.IsOutOfRange(err) { // our memory is older than what we have confirmed
		s.log.Error("events of a shim are lost: it has dropped them, because they had been handed on", "namespace", b.Namespace, "id", b.ID, "error", err)
		err = shim.Follow(s.in(b.Namespace), 0, hand)
	}
	return err
}

// hand hands an event on, then remembers that it was. The log of events has its number with it; the bundle's own note counts
// once the log has dropped the event.
func (s *Service) hand(b *bundle.Bundle, source string, e *shims.Event) {
	if err := s.events.ForwardFrom(source, e.Seq, shims.Envelope(b.Namespace, e)); err != nil {
		s.log.Error("a shim's event is malformed", "namespace", b.Namespace, "id", b.ID, "topic", e.Topic, "error", err)
	}
	failpoint.Hit("tasks.event.forwarded")
	if err := b.SetCursor(e.Seq); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("cannot remember which events were handed on", "bundle", b.Path, "error", err)
	}
}

// catchUp hands on the events, as a ledger has them, that have not been.
func (s *Service) catchUp(b *bundle.Bundle, source string, events []*shims.Event) {
	cursor := max(b.Cursor(), s.events.Cursor(source))
	for _, e := range events {
		if e.Seq > cursor {
			s.hand(b, source, e)
		}
	}
}

// bury settles a task whose shim was dead when this daemon began. What nobody was ever told of, or was told that it is
// gone, is cleaned up; a container that lives is left alone.
func (s *Service) bury(t *Task, b *bundle.Bundle) {
	defer close(t.followed)
	if s.bequeath(t, b) {
		return
	}
	log := s.log.With("namespace", b.Namespace, "id", b.ID)
	log.Info("clearing away a task that was never made, or is deleted")
	if _, err := s.shims.Cleanup(s.in(b.Namespace), b); err != nil {
		log.Error("cannot clean up after a dead shim", "error", err) // the bundle stays: the next Create or start tries again
	} else if err := b.Remove(); err != nil {
		log.Error("cannot remove bundle", "error", err)
	}
	s.drop(t)
}

// bequeath settles a task whose shim is dead with what the shim has left, and says whether there is anything.
func (s *Service) bequeath(t *Task, b *bundle.Bundle) bool {
	d := s.examine(b)
	if d == nil {
		return false
	}
	s.log.Warn("the shim of a task is dead", "namespace", b.Namespace, "id", b.ID, "exited", d.exited, "pid", d.pid, "runs", d.alive())
	t.settle(nil, d)
	return true
}

// finish removes what is left of a task that its shim had deleted, or not made, before it died. Nobody is told again. A
// Delete under way does it, and has its answer.
func (s *Service) finish(t *Task, b *bundle.Bundle) {
	d := s.read(b).remains
	d.told = true
	t.settle(nil, &d)
	deletion, mine := t.beginDeletion()
	if !mine {
		return
	}
	if deletion.resp, deletion.err = s.deleteDead(s.in(b.Namespace), t, &d); deletion.err != nil {
		s.log.Error("cannot remove what is left of a task", "namespace", b.Namespace, "id", b.ID, "error", deletion.err)
	}
	t.endDeletion(deletion)
}

// legacy is what a shim has written down.
type legacy struct {
	remains remains
	shim    uint32 // the pid of the last shim that kept it; 0: it left no ledger
	made    bool   // somebody was told of the task, or there is a process
	started bool   // it is, or was, more than created
	paused  bool
	waits   bool // it is to be restored from a checkpoint, and was not started: there is no process
	deleted bool // and then that it is gone
	events  []*shims.Event
}

// read reads what a shim has written down.
func (s *Service) read(b *bundle.Bundle) legacy {
	own, joined := s.shims.Keeper(b)
	l := legacy{remains: remains{bundle: b, own: own, joined: joined}}
	d := &l.remains
	records, err := b.Ledger()
	if err != nil {
		s.log.Error("the ledger of a shim is damaged; what could be read is used", "bundle", b.Path, "error", err)
	}
	boot, begun := "", false
	for _, r := range records {
		if r.Header != nil {
			boot, l.shim = r.Header.BootId, r.Header.ShimPid
		}
		if p := r.Process; p != nil && p.ExecId == "" {
			d.pid, d.ticks, d.terminal, begun = p.Pid, p.StartTicks, p.Terminal, true
			d.stdio = [3]string{p.Stdin, p.Stdout, p.Stderr}
		}
		if e := r.Exit; e != nil && e.ExecId == "" {
			d.exited, d.status, d.exitedAt = true, e.Status, time.Unix(0, e.ExitedUnixNano)
		}
		if e := shims.FromLedger(r); e != nil {
			switch e.Topic {
			case "/tasks/create":
				l.made = true
			case "/tasks/start":
				l.started = true
			case "/tasks/paused", "/tasks/resumed":
				l.paused = e.Topic == "/tasks/paused"
			}
			l.deleted = l.deleted || isDeletion(e, b.ID)
			l.events = append(l.events, e)
		}
	}
	l.waits = l.made && !begun && !d.exited && boot == bootID()
	if boot != "" && boot != bootID() {
		d.pid = 0 // the number means nothing after a reboot
	}
	if len(records) == 0 {
		if !d.joined { // an endpoint's pids may be those of another machine
			d.pid, d.ticks = b.Init()
		}
		l.made = b.Created()
	}
	l.made = l.made || d.alive()
	return l
}

func isDeletion(e *shims.Event, id string) bool {
	if e.Topic != "/tasks/delete" {
		return false
	}
	var d events.TaskDelete
	return proto.Unmarshal(e.Event.GetValue(), &d) == nil && (d.ID == "" || d.ID == id)
}

func bootID() string {
	data, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data))
}

// examine reads what a dead shim has written down, and hands on the events that nobody was told of. nil: it had made no
// container, or that is deleted.
func (s *Service) examine(b *bundle.Bundle) *remains {
	l := s.read(b)
	s.catchUp(b, b.Source(), l.events)
	if !l.made || l.deleted {
		return nil
	}
	return &l.remains
}
