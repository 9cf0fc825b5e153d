package mounts

import (
	"fmt"
	"maps"

	"github.com/managerd/managerd/manager/mounts/stack"
)

// Activations gives those of all namespaces, by namespace, for the collector.
func (s *Store) Activations() (map[string][]Activation, error) { return s.all() }

// Claim is an activation that is to go: nobody else can change it until it is released.
type Claim struct {
	dir, name string
	unlock    func()
}

// Claim takes an activation that nobody works on and that is still as it was seen; nil: it is not. It waits for nothing.
func (s *Store) Claim(ns string, seen Activation) *Claim {
	c := &Claim{dir: s.path(ns, seen.Name), name: seen.Name}
	if c.unlock, _ = s.tryLock(c.dir); c.unlock == nil {
		return nil
	}
	now, err := read(c.dir, c.name)
	if err != nil || !maps.Equal(now.Labels, seen.Labels) || now.lease != seen.lease || !sameTimes(now.Active, seen.Active) {
		c.unlock()
		return nil
	}
	return c
}

func sameTimes(a, b []Active) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !a[i].At.Equal(b[i].At) {
			return false
		}
	}
	return true
}

// Remove unmounts it, and releases it. When somebody uses it, it is still there.
func (c *Claim) Remove() error {
	defer c.unlock()
	if err := stack.Undo(c.dir); err != nil {
		return fmt.Errorf("cannot deactivate mounts %q: %w", c.name, err)
	}
	return nil
}

// Release leaves it as it is.
func (c *Claim) Release() { c.unlock() }
