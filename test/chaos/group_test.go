package chaos

import (
	"errors"
	"sync"
	"time"
)

// group is goroutines that do a step again and again until they are stopped, or one fails.
type group struct{ all sync.WaitGroup }

func newGroup() *group { return &group{} }

func (g *group) run(stop <-chan struct{}, failed chan<- error, step func(n int) error) {
	g.all.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := step(n); err != nil {
				failed <- err
				return
			}
		}
	})
}

// wait waits for the last step of each.
func (g *group) wait(within time.Duration) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.all.Wait()
	}()
	select {
	case <-done:
		return nil
	case <-time.After(within):
		return errors.New("not all that was begun has come to an end")
	}
}
