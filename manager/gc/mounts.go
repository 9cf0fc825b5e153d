package gc

import (
	"time"

	"github.com/managerd/managerd/manager/mounts"
)

const (
	answer = 10 * time.Second // how long a collection waits for a file system to be unmounted
	retry  = time.Minute      // after which one that was in use is tried again
)

func (c *Collector) activations() (map[string][]mounts.Activation, error) {
	if c.Mounts == nil {
		return nil, nil
	}
	return c.Mounts.Activations()
}

// unmount deactivates. One that is in use stays as it is for the next collection, and one whose file system does not answer
// is left alone until it does.
func (c *Collector) unmount(r removed, res *Result) {
	done := make(chan error, 1)
	go func() { done <- r.free() }()
	timer := time.NewTimer(answer)
	defer timer.Stop()
	select {
	case err := <-done:
		if err == nil {
			res.Removed[r.kind]++
			return
		}
		c.Log.Warn("mounts that nobody needs could not be unmounted; the next collection tries again", "name", r.key, "error", err)
		res.Next = sooner(res.Next, time.Now().Add(retry))
	case <-timer.C:
		c.Log.Warn("mounts that nobody needs are being unmounted, and their file system does not answer", "name", r.key)
	}
}
