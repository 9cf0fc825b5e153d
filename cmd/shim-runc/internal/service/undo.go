package service

import "log/slog"

// undoStack takes a half-made thing apart again, last part first.
type undoStack []func() error

func (u *undoStack) add(fn func() error) { *u = append(*u, fn) }

func (u *undoStack) run(log *slog.Logger) {
	for i := len(*u) - 1; i >= 0; i-- {
		if err := (*u)[i](); err != nil {
			log.Error("cannot undo", "error", err)
		}
	}
}
