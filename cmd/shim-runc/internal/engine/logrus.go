package engine

import (
	"context"
	"io"
	"log/slog"

	"github.com/sirupsen/logrus"
)

// heard passes libcontainer's warnings on, those of a container's init too: it knows one logger only, which is global.
type heard struct{ log *slog.Logger }

// hear makes log the place for what libcontainer has to say.
func hear(log *slog.Logger) {
	hooks := logrus.LevelHooks{}
	hooks.Add(heard{log})
	logrus.StandardLogger().ReplaceHooks(hooks)
	logrus.SetOutput(io.Discard)
}

// Levels are logrus's that are passed on.
func (heard) Levels() []logrus.Level { return logrus.AllLevels[:logrus.WarnLevel+1] }

// Fire passes one line on.
func (h heard) Fire(e *logrus.Entry) error {
	level := slog.LevelError
	if e.Level == logrus.WarnLevel {
		level = slog.LevelWarn
	}
	var attrs []slog.Attr
	for k, v := range e.Data {
		attrs = append(attrs, slog.Any(k, v))
	}
	h.log.LogAttrs(context.Background(), level, "libcontainer: "+e.Message, attrs...)
	return nil
}
