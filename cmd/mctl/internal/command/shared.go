package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

const sigkill = uint32(unix.SIGKILL)

// cleaning is how long it may take to take away what was half made.
const cleaning = 10 * time.Second

// parseSignal reads TERM, SIGTERM, RTMIN+3 or 15.
func parseSignal(s string) (uint32, error) {
	const rtmin, highest = 34, 64 // as glibc counts them
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > highest {
			return 0, fmt.Errorf("signal %d is not between 1 and %d", n, highest)
		}
		return uint32(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if rest, ok := strings.CutPrefix(name, "RTMIN"); ok {
		if n, err := strconv.Atoi("0" + strings.TrimPrefix(rest, "+")); err == nil && rtmin+n <= highest && (rest == "" || rest[0] == '+') {
			return uint32(rtmin + n), nil
		}
	}
	if n := unix.SignalNum("SIG" + name); n != 0 {
		return uint32(n), nil
	}
	return 0, fmt.Errorf("there is no signal %q", s)
}

// each calls f for every name, and joins the errors.
func each(names []string, f func(string) error) error {
	var errs []error
	for _, n := range names {
		errs = append(errs, f(n))
	}
	return errors.Join(errs...)
}

// all calls f for every name at once. Results are in the order of the names, without those that failed.
func all[T any](names []string, f func(string) (T, error)) ([]T, error) {
	results, errs := make([]T, len(names)), make([]error, len(names))
	var calls sync.WaitGroup
	for i, n := range names {
		calls.Go(func() { results[i], errs[i] = f(n) })
	}
	calls.Wait()
	done := results[:0]
	for i, r := range results {
		if errs[i] == nil {
			done = append(done, r)
		}
	}
	return done, errors.Join(errs...)
}

// ending reads from r until ctx ends, which r knows nothing of. Then it may take more from r than it gives.
func ending(ctx context.Context, r io.Reader) io.Reader {
	out, in := io.Pipe()
	context.AfterFunc(ctx, func() { _ = in.CloseWithError(context.Cause(ctx)) })
	go func() {
		_, err := io.CopyBuffer(in, struct{ io.Reader }{r}, make([]byte, 1<<20))
		_ = in.CloseWithError(err) // nil is the end
	}()
	return out
}

// quietly adds --quiet.
func quietly(cmd *cobra.Command, quiet *bool) {
	cmd.Flags().BoolVarP(quiet, "quiet", "q", false, "print only the names")
}

// list prints rows, or with --quiet their names.
func list[T any](c *cli, quiet bool, names []string, t table.Table[T], rows []T) error {
	switch {
	case !quiet:
		return t.Print(c.out, c.format(), rows)
	case c.format() == table.JSON:
		return table.PrintJSON(c.out, append([]string{}, names...))
	}
	for _, n := range names {
		if _, err := fmt.Fprintln(c.out, n); err != nil {
			return err
		}
	}
	return nil
}

// labelArgs reads KEY=VALUE arguments; KEY= clears. paths are the field mask for an update of just these.
func labelArgs(given []string) (labels map[string]string, paths []string, err error) {
	labels = map[string]string{}
	for _, g := range given {
		k, v, ok := strings.Cut(g, "=")
		if !ok || k == "" {
			return nil, nil, fmt.Errorf("%q is not KEY=VALUE", g)
		}
		if path := "labels." + k; !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
		labels[k] = v
		if v == "" {
			delete(labels, k)
		}
	}
	return labels, paths, nil
}

// printLabels prints an object's labels.
func (c *cli) printLabels(labels map[string]string) error {
	if c.format() == table.JSON {
		if labels == nil {
			labels = map[string]string{}
		}
		return table.PrintJSON(c.out, labels)
	}
	_, err := fmt.Fprintln(c.out, table.Labels(labels, ""))
	return err
}

// notice tells the user something while a command goes on.
func (c *cli) notice(text string) {
	end := "\n"
	if c.raw.Load() {
		end = "\r\n"
	}
	_, _ = fmt.Fprint(c.err, "mctl: ", text, end)
}
