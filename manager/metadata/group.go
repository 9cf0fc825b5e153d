package metadata

import (
	"errors"
	"runtime/debug"
	"sync"

	bolt "go.etcd.io/bbolt"
)

// group lets writers that wait while a commit is under way share the next one, and so its fsync. Nobody waits for
// company: a writer that finds the database idle commits at once, alone.
type group struct {
	mu      sync.Mutex
	waiting []*write // in order of arrival; empty when not busy
	busy    bool     // somebody leads a round

	watchers watchers
}

type write struct {
	fn     func(*Tx) error
	once   bool      // fn must not run a second time
	turn   chan bool // true: lead the next round; false: err is the result
	err    error
	thrown any // what fn panicked with
}

var (
	errUndo  = errors.New("undo")
	errEnded = errors.New("the goroutine that led the commit has ended")
)

// do returns when fn was committed or has failed. Of the writers of one round one leads and runs all; then it hands the
// lead to the first of those who came meanwhile.
func (g *group) do(db *DB, fn func(*Tx) error, once bool) error {
	w := &write{fn: fn, once: once, turn: make(chan bool, 1), err: errEnded}
	g.mu.Lock()
	g.waiting = append(g.waiting, w)
	lead := !g.busy
	g.busy = true
	g.mu.Unlock()
	if lead || <-w.turn {
		g.lead(db, w)
	}
	if w.thrown != nil {
		panic(w.thrown)
	}
	return w.err
}

func (g *group) lead(db *DB, me *write) {
	g.mu.Lock()
	round := g.takeLocked()
	g.mu.Unlock()

	defer func() {
		g.mu.Lock()
		g.busy = len(g.waiting) > 0
		if g.busy {
			g.waiting[0].turn <- true
		}
		g.mu.Unlock()
		for _, w := range round {
			if w != me {
				w.turn <- false
			}
		}
	}()
	g.commit(db, round)
}

// takeLocked takes the next round off the queue: all that wait, but at most one of the kind that runs once. That one
// comes last: when another fails, it has not run yet. The first of the queue, which leads, is always part of the round.
func (g *group) takeLocked() []*write {
	var round, rest []*write
	var last *write
	for _, w := range g.waiting {
		switch {
		case !w.once:
			round = append(round, w)
		case last == nil:
			last = w
		default:
			rest = append(rest, w)
		}
	}
	if last != nil {
		round = append(round, last)
	}
	g.waiting = rest
	return round
}

// commit runs round in one transaction. bolt has no savepoints: when one function fails all is undone, and the others
// run again without it. The error of the one that failed counts only once the others are committed: it may have seen
// what they wrote.
func (g *group) commit(db *DB, round []*write) {
	var failed []*write
	for {
		var bad *write
		var changes []Change
		err := db.commit(func(btx *bolt.Tx) error {
			for _, w := range round {
				if !w.run(&Tx{btx, &changes}) {
					bad = w
					return errUndo
				}
			}
			return nil
		})
		if bad == nil {
			for _, w := range round {
				w.err = err
			}
			if err != nil {
				for _, w := range failed {
					w.err = err
				}
				return
			}
			g.watchers.tell(changes)
			return
		}
		var rest []*write
		for _, w := range round {
			if w != bad {
				rest = append(rest, w)
			}
		}
		if round, failed = rest, append(failed, bad); len(round) == 0 {
			return
		}
	}
}

// run tells whether fn succeeded. A panic is kept for the goroutine whose function it was.
func (w *write) run(tx *Tx) (ok bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		p := recover()
		switch {
		case p == nil:
		case fromBolt(p):
			w.err, ok = damageOf(p), false
		default:
			w.thrown, ok = p, false
		}
	}()
	if err := w.fn(tx); err != nil {
		w.err = err
		return false
	}
	return true
}
