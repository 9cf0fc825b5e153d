package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/managerd/managerd/manager/metadata"
)

// notify tells the service manager (sd_notify(3)), if there is one.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("cannot notify the service manager", "state", state, "error", err)
	}
}

// Ready tells the service manager that the daemon serves, and which of its parts do not work.
func (s *Server) Ready() {
	notify(s.log, daemon.SdNotifyReady+"\nSTATUS="+s.status())
}

// changed tells it when that is different from what it was when Ready was called.
func (s *Server) changed() { notify(s.log, "STATUS="+s.status()) }

// Reloading tells the service manager that the configuration is being read again; Ready is to follow.
func (s *Server) Reloading() {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	notify(s.log, fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

// status is one line: what does not work.
func (s *Server) status() string {
	all, err := s.plugins.List()
	if err != nil {
		return err.Error()
	}
	failed, warnings := "", ""
	for _, p := range all {
		if w := p.Warning(); w != "" {
			warnings += "; " + w
		}
		if p.Err != nil && !p.Skipped() {
			failed += " " + p.Name()
		}
	}
	if failed == "" {
		return "serving" + warnings
	}
	return "serving, without" + failed + warnings
}

// watch feeds the service manager's watchdog (WatchdogSec=) as long as the daemon answers, through its own socket and
// from its own database, within the time that the watchdog gives.
func (s *Server) watch(ctx context.Context) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		s.log.Warn("the service manager's watchdog is not fed", "error", err)
	}
	if limit <= 0 {
		return
	}
	conn, err := grpc.NewClient("unix://"+s.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.log.Error("the service manager's watchdog is not fed", "error", err)
		return
	}
	s.watching.Go(func() {
		defer func() { _ = conn.Close() }()
		tick := time.NewTicker(limit / 3)
		defer tick.Stop()
		for {
			if err := s.healthy(ctx, conn, limit/3); err == nil {
				notify(s.log, daemon.SdNotifyWatchdog)
			} else if ctx.Err() == nil {
				s.log.Error("not healthy; the watchdog is not fed", "error", err)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
}

// healthy asks the daemon as a client would.
func (s *Server) healthy(ctx context.Context, conn *grpc.ClientConn, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if _, err := healthapi.NewHealthClient(conn).Check(ctx, &healthapi.HealthCheckRequest{}); err != nil {
		return fmt.Errorf("the API does not answer: %w", err)
	}
	if s.db == nil {
		return nil
	}
	read := make(chan error, 1) // a database that hangs must not hang this
	go func() { read <- s.db.View(func(*metadata.Tx) error { return nil }) }()
	select {
	case err := <-read:
		return err
	case <-ctx.Done():
		return fmt.Errorf("the database does not answer: %w", ctx.Err())
	}
}
