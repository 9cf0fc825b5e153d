package chaos

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/image"
)

var (
	duration = flag.Duration("chaos.duration", 30*time.Second, "how long TestChaos kills")
	seed     = flag.Uint64("chaos.seed", 0, "repeats the faults of a run; 0: others every time")
	tickers  = flag.Int("chaos.tickers", 4, "containers that write a line per millisecond all the time")
	workers  = flag.Int("chaos.workers", 4, "clients that run containers from their making to their end")
	only     = flag.String("chaos.point", "", "part of the names of the failpoints that TestFailpoints goes through")
)

var (
	bin     string // directory of the programs
	archive string // of the image
)

func TestMain(m *testing.M) { os.Exit(runAll(m)) }

func runAll(m *testing.M) int {
	flag.Parse()
	dir, err := os.MkdirTemp("", "managerd-chaos-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	archive = filepath.Join(dir, "busybox.tar")
	if bin, err = harness.Programs(dir); err == nil {
		err = image.Write(archive, image.Options{})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}
