package service

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi/blackbox"
)

// looks are the requests that change nothing. Who watches a shim sends them all day: only those that failed are recorded.
var looks = map[string]bool{
	"State": true, "Pids": true, "Stats": true, "Connect": true, "Wait": true, "Describe": true, "Exits": true,
	"SandboxStatus": true, "PingSandbox": true, "WaitSandbox": true, "SandboxMetrics": true, "Platform": true,
}

// Observe puts requests into the black box: when they have come, and when they were answered.
func (s *Service) Observe(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	name := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	begin, what := time.Now(), name
	resp, err := method(ctx, func(req any) error {
		err := unmarshal(req)
		what = describeRequest(name, req)
		if !looks[name] {
			s.box.Add(blackbox.Request, 0, what)
		}
		return err
	})
	switch {
	case err != nil:
		s.box.Add(blackbox.Error, time.Since(begin), what+": "+status.Convert(err).Message())
	case !looks[name]:
		s.box.Add(blackbox.Answer, time.Since(begin), what)
	}
	return resp, err
}

// describeRequest says what was asked, in a few words: of which exec, and with which signal.
func describeRequest(name string, req any) string {
	if r, ok := req.(interface{ GetExecID() string }); ok && r.GetExecID() != "" {
		name += " exec " + r.GetExecID()
	}
	if r, ok := req.(interface {
		GetSignal() uint32
		GetAll() bool
	}); ok {
		name += fmt.Sprintf(" signal %d", r.GetSignal())
		if r.GetAll() {
			name += " to all"
		}
	}
	return name
}

// summary says what a ledger record tells, in a few words.
func summary(r *ledgerpb.Record) string {
	what := fmt.Sprintf("%s (%d)", r.Event.Topic, r.Seq)
	if e := r.Event; e.OomKills > 0 {
		what += fmt.Sprintf(" kill %d, limit: %s %s", e.OomKills, e.OomLevel, e.OomCgroup)
	}
	if e := r.Exit; e != nil {
		if e.ExecId != "" {
			what += " exec " + e.ExecId
		}
		what += fmt.Sprintf(" process %d exit status %d", e.Pid, e.Status)
		if e.Unknown != "" {
			what += ", unknown: " + e.Unknown
		}
		if e.TimedOut {
			what += ", its time was over"
		}
	}
	return what
}

// boxed is a log handler that also puts warnings and errors into the black box.
type boxed struct {
	slog.Handler
	box *blackbox.Ring
}

func (b boxed) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		what := r.Message
		r.Attrs(func(a slog.Attr) bool {
			what += " " + a.Key + "=" + a.Value.String()
			return true
		})
		b.box.Add(blackbox.Error, 0, what)
	}
	return b.Handler.Handle(ctx, r)
}

func (b boxed) WithAttrs(attrs []slog.Attr) slog.Handler {
	return boxed{b.Handler.WithAttrs(attrs), b.box}
}

func (b boxed) WithGroup(name string) slog.Handler { return boxed{b.Handler.WithGroup(name), b.box} }
