// Command demo shows the main job on a private daemon: a container outlives its manager. It needs no network, no
// configuration and nothing that is installed, changes nothing outside a temporary directory, and removes everything
// again, also when it fails or is interrupted. What it claims it checks: a mismatch ends it with status 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/managerd/managerd/test/harness"
)

// cleaning is how long the cleaning up may take, in which no signal counts.
const cleaning = time.Minute

func main() {
	bin := flag.String("bin", "bin", "`directory` with managerd, shim-runc and mctl")
	archive := flag.String("image", "", "`file` with an image, as docker save or skopeo write it; default: one made of busybox")
	client := flag.String("client", "", "another `program` with ctr's grammar in the place of mctl")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	scr := newScreen(os.Stdout, colours(os.Stdout))
	if err := run(ctx, scr, *bin, *archive, *client); err != nil {
		scr.failed(err)
		os.Exit(1)
	}
}

// run shows everything, and cleans up whatever happened.
func run(ctx context.Context, scr *screen, bin, archive, client string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("containers need root: try again with sudo")
	}
	began := time.Now()
	s, err := newStage(ctx, scr, bin, client)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		if cerr := s.close(); cerr != nil {
			err = errors.Join(err, cerr)
		} else if err != nil {
			err = fmt.Errorf("%w\n(everything that was started is gone again)", err)
		}
		if err == nil {
			scr.end(time.Since(began))
		}
	}()
	scr.title("managerd: a container that does not depend on its manager",
		"All of it happens below "+s.d.Dir+" and is gone afterwards.")
	if err := s.begin(); err != nil {
		return err
	}
	if archive == "" {
		archive = filepath.Join(s.d.Dir, "busybox.tar")
		return s.busybox(archive)
	}
	return s.own(archive)
}

// stage is where the demo plays: a daemon, its client, and what is known about both.
type stage struct {
	ctx    context.Context
	scr    *screen
	d      *harness.Daemon
	client string // path of mctl
	name   string // what it is called on the screen
	image  string // reference of the image that was imported
}

func newStage(ctx context.Context, scr *screen, bin, client string) (*stage, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	if client == "" {
		client = filepath.Join(bin, "mctl")
	}
	for _, p := range []string{filepath.Join(bin, "managerd"), filepath.Join(bin, "shim-runc"), client} {
		if _, err := os.Stat(p); err != nil {
			return nil, fmt.Errorf("%w (make build makes it)", err)
		}
	}
	d, err := harness.New(bin)
	if err != nil {
		return nil, err
	}
	d.Namespace = "demo" + strings.TrimPrefix(filepath.Base(d.Dir), "managerd") // as unique as the directory
	d.Args = []string{"--log-level", "info"}
	return &stage{ctx: ctx, scr: scr, d: d, client: client, name: filepath.Base(client)}, nil
}

// close ends and removes everything. It works without a daemon, and when one cannot be started any more.
func (s *stage) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleaning)
	defer cancel()
	err := s.d.Ready(time.Millisecond)
	if err != nil { // it was killed, or never was
		_ = s.d.Kill()
		err = s.d.Start()
	}
	if err == nil {
		err = s.d.Clear(ctx)
	}
	if cerr := s.d.Close(); cerr != nil {
		err = errors.Join(err, cerr, s.d.Raze())
	}
	if err != nil {
		return fmt.Errorf("cleaning up: %w", err)
	}
	return nil
}
