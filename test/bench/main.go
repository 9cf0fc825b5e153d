// Command bench measures managerd beside Debian's containerd and runc, or beside another build of itself, on this machine:
// what a client waits for through gRPC, the CPU time it costs, memory per shim, and how soon a daemon serves. Both run
// privately below temporary directories, are asked by the same client code in turn, and are gone afterwards.
//
// Absolute times say as much about the machine as about the programs, so every figure is a pair, taken within the same
// second, and what counts is the median of the pairs' ratios.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// options is the command line.
type options struct {
	bin, against, json, debug          string
	pairs, containers, restarts, pulls int
	alone, images                      bool
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "`directory` with managerd and shim-runc")
	flag.StringVar(&o.against, "against", "", "`directory` of another build to measure against, instead of Debian's containerd")
	flag.StringVar(&o.json, "json", "", "write the figures to `file` too")
	flag.IntVar(&o.pairs, "pairs", 30, "containers of each side that are created, used and deleted, per section")
	flag.IntVar(&o.containers, "containers", 20, "containers of each side that run at once while memory is measured")
	flag.IntVar(&o.restarts, "restarts", 5, "restarts of each daemon")
	flag.IntVar(&o.pulls, "pulls", 5, "times that each side pulls and imports each image")
	flag.BoolVar(&o.images, "images", false, "measure pulls and imports only")
	flag.BoolVar(&o.alone, "alone", false, "measure managerd only, and the phases of what its shims do")
	flag.StringVar(&o.debug, "debug", "", "managerd serves Go's profiles on `socket` meanwhile (curl --unix-socket)")
	flag.Parse()
	if flag.NArg() > 0 || o.pairs < 1 || o.containers < 1 || o.restarts < 1 || o.pulls < 1 || o.alone && o.against != "" {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := bench(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// bench measures and prints; it leaves nothing behind, whatever ends it.
func bench(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("containers need root")
	}
	sides, err := newSides(o)
	defer func() {
		for _, s := range sides {
			err = errors.Join(err, s.close())
		}
	}()
	if err != nil {
		return err
	}
	for _, s := range sides {
		if err := s.begin(ctx); err != nil {
			return err
		}
	}
	r := newReport(os.Stdout)
	r.introduce(ctx, sides)
	if o.images {
		return errors.Join(measureImages(ctx, r, sides, o), r.finish(o.json))
	}
	for _, seccomp := range []bool{false, true} {
		if err := measureContainers(ctx, r, sides, o.pairs, seccomp); err != nil {
			return err
		}
	}
	if err := measureMany(ctx, r, sides, o); err != nil {
		return err
	}
	if err := measureImages(ctx, r, sides, o); err != nil {
		return err
	}
	return r.finish(o.json)
}
