package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// sideServer is an HTTP server beside the API: metrics, or debugging.
type sideServer struct{ http.Server }

// Close ends it at once.
func (s *sideServer) Close() error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return s.Server.Close()
}

// serveSide opens the sockets for metrics (TCP) and for debugging (a Unix socket) that the configuration asks for.
func (s *Server) serveSide() error {
	if address := s.cfg.Metrics.Address; address != "" {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("cannot serve metrics on %s: %w", address, err)
		}
		registry := prometheus.NewRegistry()
		registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
		if s.collector != nil {
			registry.MustRegister(s.collector.Metrics()...)
		}
		mux := http.NewServeMux()
		mux.Handle("/v1/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
		s.serveHTTP("metrics", l, mux)
	}
	if address := s.cfg.Debug.Address; address != "" {
		l, err := listen(unixPath(address), s.cfg.Debug.UID, s.cfg.Debug.GID)
		if err != nil {
			return err
		}
		mux := http.NewServeMux()
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
		s.serveHTTP("debug", l, mux)
	}
	return nil
}

func (s *Server) serveHTTP(what string, l net.Listener, h http.Handler) {
	side := &sideServer{http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}}
	s.side = append(s.side, side)
	go func() {
		if err := side.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("cannot serve "+what, "address", l.Addr(), "error", err)
		}
	}()
	s.log.Info("serving", "protocol", what, "address", l.Addr().String())
}
