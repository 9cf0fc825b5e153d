// Package command is managerd's command line: containerd's flags and verbs, the configuration they override, and the
// daemon's life between the signals that start and end it.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/server"
	"github.com/managerd/managerd/shimapi/version"
)

// defaultConfig is read when it is there; a file that was asked for must be.
const defaultConfig = "/etc/managerd/config.toml"

// flags are those that override the configuration file.
type flags struct {
	config, root, state, address, level, format string
}

// Main runs the command line and returns the exit status.
func Main(argv []string) int {
	root := newRoot()
	root.SetArgs(argv)
	if err := root.Execute(); err != nil {
		var status exitStatus
		if errors.As(err, &status) {
			return int(status)
		}
		_, _ = fmt.Fprintf(os.Stderr, "managerd: %v\n", err)
		return 1
	}
	return 0
}

// exitStatus is an error that has been told already.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

func newRoot() *cobra.Command {
	f := &flags{}
	root := &cobra.Command{
		Use:   "managerd",
		Short: "A container manager, wire-compatible with containerd, that containers do not depend on",
		Long: `managerd serves containerd's gRPC API. Containers are kept by shims, one process each, that live on when managerd
is stopped, killed or replaced; the next managerd finds them.`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version.Version + " " + version.Revision,
		RunE:          func(cmd *cobra.Command, _ []string) error { return f.serve(cmd.Context()) },
	}
	root.SetVersionTemplate("managerd github.com/managerd/managerd {{.Version}}\n")
	p := root.PersistentFlags()
	p.StringVarP(&f.config, "config", "c", "", "configuration `file` (default "+defaultConfig+", if it is there)")
	p.StringVar(&f.root, "root", "", "`directory` of what survives a reboot: metadata, content, snapshots")
	p.StringVar(&f.state, "state", "", "`directory` of what does not: sockets and bundles of running tasks")
	p.StringVarP(&f.address, "address", "a", "", "`path` of the socket for gRPC")
	p.StringVarP(&f.level, "log-level", "l", "", "`level` of the log: trace, debug, info, warn, error, fatal, panic")
	p.StringVar(&f.format, "log-format", "", "`format` of the log: text or json")
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(f.configCommand(), hookCommand(), f.publishCommand())
	return root
}

// load reads the configuration file and lays the flags over it.
func (f *flags) load() (*config.Config, []config.Warning, error) {
	cfg, warnings := config.Default(), []config.Warning(nil)
	path := f.config
	if path == "" {
		if _, err := os.Stat(defaultConfig); err == nil {
			path = defaultConfig
		}
	}
	if path != "" {
		var err error
		if cfg, warnings, err = config.Load(path); err != nil {
			return nil, nil, err
		}
	}
	for _, o := range []struct {
		value string
		to    *string
		path  bool
	}{
		{f.root, &cfg.Root, true}, {f.state, &cfg.State, true}, {f.address, &cfg.GRPC.Address, true},
		{f.level, &cfg.Debug.Level, false}, {f.format, &cfg.Debug.Format, false},
	} {
		if o.value == "" {
			continue
		}
		if o.path { // of a command line, it may be relative
			abs, err := filepath.Abs(o.value)
			if err != nil {
				return nil, nil, err
			}
			o.value = abs
		}
		*o.to = o.value
	}
	return cfg, warnings, cfg.Validate()
}

// serve is the daemon's life: from here to SIGTERM or SIGINT.
func (f *flags) serve(ctx context.Context) error {
	cfg, warnings, err := f.load()
	if err != nil {
		return err
	}
	var level slog.LevelVar
	log, err := newLogger(os.Stderr, &level, cfg.Debug.Level, cfg.Debug.Format)
	if err != nil {
		return err
	}
	slog.SetDefault(log)
	warn(log, warnings)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	signal.Ignore(syscall.SIGPIPE) // a log that goes away ends nothing
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	log.Info("starting managerd", "version", version.Version, "revision", version.Revision, "pid", os.Getpid(),
		"root", cfg.Root, "state", cfg.State)
	s, err := server.New(ctx, cfg, log)
	if err != nil {
		return err
	}
	go func() {
		for {
			select {
			case <-reload:
				s.Reloading()
				f.reload(cfg, &level, log)
				s.Ready()
			case <-ctx.Done():
				return
			}
		}
	}()
	err = s.Run(ctx)
	log.Info("stopped; shims and containers live on")
	return errors.Join(err, s.Close())
}

func warn(log *slog.Logger, warnings []config.Warning) {
	for _, w := range warnings {
		log.Warn("configuration: "+w.Text, "file", w.File, "line", w.Line, "key", w.Key)
	}
}

// reload reads the configuration again. What can change in a running daemon, the level of its log, does; what else has
// changed is named: it holds from the next start on, which containers do not notice. A file with an error changes nothing.
func (f *flags) reload(cfg *config.Config, level *slog.LevelVar, log *slog.Logger) {
	now, warnings, err := f.load()
	if err != nil {
		log.Error("cannot reload the configuration; it stays as it is", "error", err)
		return
	}
	warn(log, warnings)
	for _, key := range config.Changed(cfg, now) {
		if key == "debug.level" {
			continue
		}
		log.Warn("configuration: this key has changed and holds from the next start on", "key", key)
	}
	if err := setLevel(level, now.Debug.Level); err != nil {
		log.Error("cannot reload the configuration", "error", err)
		return
	}
	log.Info("configuration reloaded", "level", level.Level())
}

// levels are containerd's; those that slog does not know are the nearest ones.
var levels = map[string]slog.Level{
	"trace": slog.LevelDebug, "debug": slog.LevelDebug, "": slog.LevelInfo, "info": slog.LevelInfo,
	"warn": slog.LevelWarn, "warning": slog.LevelWarn, "error": slog.LevelError, "fatal": slog.LevelError, "panic": slog.LevelError,
}

func setLevel(v *slog.LevelVar, name string) error {
	l, ok := levels[name]
	if !ok {
		return fmt.Errorf("log level %q is none of trace, debug, info, warn, error, fatal, panic", name)
	}
	v.Set(l)
	return nil
}

// newLogger writes to w what is at least of a level, which the caller may change later on.
func newLogger(w io.Writer, v *slog.LevelVar, level, format string) (*slog.Logger, error) {
	if err := setLevel(v, level); err != nil {
		return nil, err
	}
	opts := &slog.HandlerOptions{Level: v}
	switch format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("log format %q is neither text nor json", format)
}
