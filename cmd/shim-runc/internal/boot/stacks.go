package boot

import (
	"log/slog"
	"os"
	"os/signal"
	"runtime"

	"golang.org/x/sys/unix"
)

// mostStacks is the most bytes of stacks that are written.
const mostStacks = 4 << 20

// tellStacks writes at each SIGUSR1, until the process ends, what every goroutine is doing to the file at path: also of a
// shim that answers no request any more.
func tellStacks(path string, log *slog.Logger) {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGUSR1)
	for range asked {
		buf := make([]byte, 64<<10)
		n := runtime.Stack(buf, true)
		for n == len(buf) && n < mostStacks {
			buf = make([]byte, 2*len(buf))
			n = runtime.Stack(buf, true)
		}
		half := path + ".new" // who reads it finds it whole
		err := os.WriteFile(half, buf[:n], 0o600)
		if err == nil {
			err = os.Rename(half, path)
		}
		if err != nil {
			log.Warn("cannot write stacks", "error", err)
		}
	}
}
