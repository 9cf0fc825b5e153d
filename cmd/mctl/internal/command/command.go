// Package command is mctl's command line: ctr's grammar, and what ctr lacks. A file per noun; what they share (flags for
// all, the connection, errors and exit statuses) is here.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/namespaces"
)

// Exit statuses of mctl itself. Those of run, exec, attach and wait are the process's, whatever they are.
const (
	statusFailed = 1
	statusUsage  = 2
)

// defaultAddress is where a managerd serves that nobody told otherwise.
const defaultAddress = "/run/managerd/managerd.sock"

// cli is one invocation.
type cli struct {
	address, namespace, output string
	timeout, connectTimeout    time.Duration

	in       io.Reader
	out, err io.Writer

	release func()      // lets signals be somebody else's; before that they end the command
	raw     atomic.Bool // the terminal is raw now
}

// Main runs the command line and returns the exit status.
func Main(argv []string) int {
	c := &cli{in: os.Stdin, out: os.Stdout, err: os.Stderr}
	root := c.root()
	root.SetArgs(argv)
	err := root.ExecuteContext(context.Background())
	var status exitStatus
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &usage):
		_, _ = fmt.Fprintf(c.err, "mctl: %v; see `%s --help`\n", err, usage.command)
		return statusUsage
	}
	// Of several errors, each on its line.
	_, _ = fmt.Fprintf(c.err, "mctl: %s\n", strings.ReplaceAll(err.Error(), "\n", "\nmctl: "))
	return statusFailed
}

// exitStatus is a process's exit status that becomes ours. Nothing is printed.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// usageError is a command line that makes no sense.
type usageError struct {
	command string // whose help tells more
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// misused makes a usageError.
func misused(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{cmd.CommandPath(), fmt.Errorf(format, args...)}
}

// format is the value of --output.
func (c *cli) format() table.Format { return table.Format(c.output) }

// interrupted is the cause of a context that a signal ended.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.signal.String() }

// interruptible gives a context that ends with the first signal that wants us to end; what was half made can then be
// taken away again. release gives the signals back; one that came before has ended the context when it returns.
func interruptible(ctx context.Context) (_ context.Context, release func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	stop, done := make(chan struct{}), make(chan struct{})
	end := func(s os.Signal) {
		if number, ok := s.(syscall.Signal); ok {
			cancel(interrupted{number})
		}
	}
	go func() {
		defer close(done)
		select {
		case s := <-signals:
			end(s)
		case <-stop:
			select { // both were there
			case s := <-signals:
				end(s)
			default:
			}
		}
	}()
	return ctx, sync.OnceFunc(func() {
		signal.Stop(signals)
		close(stop)
		<-done
	})
}

// within calls f with a context that ends with --timeout and with a signal, and says so when f failed for that.
func (c *cli) within(cmd *cobra.Command, f func(ctx context.Context) error) error {
	ctx, release := interruptible(namespaces.With(cmd.Context(), c.namespace))
	defer release()
	c.release = release
	if c.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	err := f(ctx)
	var status exitStatus
	var sig interrupted
	switch {
	case err == nil || errors.As(err, &status):
		return err
	case errors.As(context.Cause(ctx), &sig):
		return exitStatus(128 + int(sig.signal)) // as a shell says it of a command that a signal ended
	case late(ctx):
		return fmt.Errorf("not done within --timeout %v: %w", c.timeout, err)
	}
	return err
}

// late tells whether the deadline of ctx has passed, or is about to: the daemon knows it too, and may be the first to say so.
func late(ctx context.Context) bool {
	end, ok := ctx.Deadline()
	return ok && time.Until(end) < 50*time.Millisecond
}

// connect calls f with a connection to the daemon, within a context that carries the namespace.
func (c *cli) connect(cmd *cobra.Command, f func(ctx context.Context, cl *client.Client) error) error {
	return c.within(cmd, func(ctx context.Context) error {
		cl, err := client.Open(c.address)
		if err != nil {
			return err
		}
		defer func() { _ = cl.Close() }()
		if c.connectTimeout > 0 {
			if err := cl.Reach(ctx, c.connectTimeout); err != nil {
				return err
			}
		}
		if err = f(ctx, cl); ctx.Err() != nil {
			return err
		}
		return cl.Explain(err)
	})
}

// check looks at the flags for all commands.
func (c *cli) check(cmd *cobra.Command, _ []string) error {
	if _, err := table.ParseFormat(c.output); err != nil {
		return misused(cmd, "%w", err)
	}
	if err := identifiers.Validate(c.namespace); err != nil {
		return misused(cmd, "namespace: %w", err)
	}
	return nil
}

// env is the first of these variables that is set, else otherwise.
func env(otherwise string, names ...string) string {
	for _, n := range names {
		if v := os.Getenv(n); v != "" {
			return v
		}
	}
	return otherwise
}

// args wants at least least arguments, and at most most (-1: any number).
func args(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		switch {
		case len(given) < least:
			return misused(cmd, "arguments are missing: %s", cmd.UseLine())
		case most >= 0 && len(given) > most:
			return misused(cmd, "%q is one argument too many: %s", given[most], cmd.UseLine())
		}
		return nil
	}
}

// group is a command that only has others below it.
func group(use, short string, aliases []string, below ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{
		Use: use, Short: short, Aliases: aliases, Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, given []string) error {
			if len(given) > 0 {
				return misused(cmd, "there is no command %q", cmd.CommandPath()+" "+given[0])
			}
			return cmd.Help()
		},
	}
	g.AddCommand(below...)
	return g
}
