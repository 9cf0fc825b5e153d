package tasks

// UpgradeShims replaces, in the background and one after the other, the code of those shims that run another version than
// that on disk, once all that are there are known. With idle, those that have execs are left alone. A shim whose upgrade
// fails goes on as it is, and that is logged.
func (s *Service) UpgradeShims(idle bool, recovered <-chan struct{}) error {
	return s.background(func() {
		select {
		case <-recovered:
		case <-s.ctx.Done():
			return
		}
		version, err := s.shims.Version(s.ctx)
		if err != nil {
			s.log.Error("shims are not upgraded", "error", err)
			return
		}
		s.mu.Lock()
		all := make([]*Task, 0, len(s.tasks))
		for _, t := range s.tasks {
			all = append(all, t)
		}
		s.mu.Unlock()
		for _, t := range all {
			if shim, _, _ := t.now(); shim != nil && shim.Own && s.ctx.Err() == nil {
				s.shims.Renew(s.in(t.key.ns), shim, version, idle)
			}
		}
	})
}
