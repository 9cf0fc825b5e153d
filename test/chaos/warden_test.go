package chaos

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/test/harness"
)

// warden starts a daemon again whenever it has died, as systemd does.
type warden struct {
	done, ended chan struct{}

	mu   sync.Mutex
	dead int
}

func newWarden(d *harness.Daemon) *warden {
	w := &warden{done: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		defer close(w.ended)
		for {
			select {
			case <-w.done:
				return
			case <-time.After(2 * time.Millisecond):
			}
			if !errors.Is(unix.Kill(d.PID(), 0), unix.ESRCH) {
				continue
			}
			w.mu.Lock()
			w.dead++
			_ = d.Kill() // it has been waited for; this takes note
			_ = d.Spawn()
			w.mu.Unlock()
		}
	}()
	return w
}

// kill kills the daemon, and does something before the next one is started.
func (w *warden) kill(d *harness.Daemon, meanwhile func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	pid := d.PID()
	_ = unix.Kill(pid, unix.SIGKILL)
	for !errors.Is(unix.Kill(pid, 0), unix.ESRCH) { // the harness waits for it
		time.Sleep(time.Millisecond)
	}
	meanwhile()
}

func (w *warden) deaths() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dead
}

// left is what is left behind; nobody is started meanwhile.
func (w *warden) left(d *harness.Daemon) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return d.Left()
}

func (w *warden) stop() {
	close(w.done)
	<-w.ended
}
