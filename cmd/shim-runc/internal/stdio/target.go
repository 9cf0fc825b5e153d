package stdio

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
	"github.com/managerd/managerd/shimapi"
)

// target is where a stream of output goes: one of the two. Either stream or discard takes it over.
type target struct {
	file *os.File
	log  *logsink.Stream
}

// openTarget opens what a stream's URI names.
func (s *Streams) openTarget(uri, stream string) (*target, error) {
	u, err := url.Parse(uri)
	if err != nil || !logsink.Known(u.Scheme) {
		f, err := openClient(uri, stream)
		if err != nil {
			return nil, err
		}
		return &target{file: f}, nil
	}
	log := s.logs[uri]
	if log == nil {
		t, err := logsink.Parse(u)
		if err != nil {
			return nil, fmt.Errorf("cannot use %s %q: %w", stream, uri, err)
		}
		base := filepath.Join(s.cfg.Dir, shimapi.StdioName(s.cfg.ExecID, "log-"+stream))
		if log, err = logsink.Open(logsink.Config{Target: t, Base: base}); err != nil {
			return nil, fmt.Errorf("cannot use %s %q: %w", stream, uri, err)
		}
		if s.logs == nil {
			s.logs = map[string]*logsink.Log{}
		}
		s.logs[uri] = log
	}
	to, err := log.Stream(stream)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s %q: %w", stream, uri, err)
	}
	return &target{log: to}, nil
}

// stream makes the copy of src into the target; it is not running yet. kind and client are those of its two handles; kind
// is empty for a terminal, whose master is not the copy's to close.
func (t *target) stream(src *os.File, kind, client string, closed func(kinds ...string)) stream {
	if t.log != nil {
		return newLogged(src, t.log, kind, closed)
	}
	return newOutput(src, t.file, kind, client, closed)
}

func (t *target) discard() {
	if t.log != nil {
		t.log.Close()
		return
	}
	_ = t.file.Close()
}
