// Package loggertest is a logger for tests, as nerdctl has one: a test binary whose TestMain begins with Run is one when it
// is named by a URI of this package.
package loggertest

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// verb is the first argument of a test binary that is to be a logger.
const verb = "test-logger"

// What the logger does.
const (
	Copies  = "copies"  // appends its streams to DIR/stdout and DIR/stderr, and ends with them
	Dies    = "dies"    // says why, and ends before it is ready
	Dawdles = "dawdles" // is never ready
	Stalls  = "stalls"  // is ready, never reads, and does not end on SIGTERM
)

// URI names this very program as a logger that keeps its files in dir.
func URI(dir, does string) string {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return "binary://" + exe + "?" + verb + "=" + url.QueryEscape(dir) + "&does=" + does
}

// Run is the logger, and does not return, if that is what this process is.
func Run() {
	if len(os.Args) < 2 || os.Args[1] != verb {
		return
	}
	if err := run(os.Args[2], os.Args[4]); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(7)
	}
	os.Exit(0)
}

func run(dir, does string) error {
	ready := os.NewFile(5, "ready")
	if does == Dies {
		return errors.New("no such\nlog driver")
	}
	if does == Dawdles {
		for {
			time.Sleep(time.Hour)
		}
	}
	starts, err := os.OpenFile(dir+"/starts", os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(starts, os.Getpid(), strings.Join(os.Environ(), " "))
	if err = errors.Join(err, starts.Close(), ready.Close()); err != nil {
		return err
	}
	if does == Stalls {
		signal.Ignore(unix.SIGTERM)
		for {
			time.Sleep(time.Hour)
		}
	}
	var copying sync.WaitGroup
	var errs [2]error
	for i, name := range []string{"stdout", "stderr"} {
		copying.Go(func() { errs[i] = move(3+i, dir+"/"+name) })
	}
	copying.Wait()
	return errors.Join(errs[:]...)
}

// move appends a stream to a file, without a byte in this process: whenever it is killed, none is lost.
func move(from int, path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	at, err := f.Seek(0, 2)
	for err == nil {
		var n int64
		if n, err = unix.Splice(from, nil, int(f.Fd()), &at, 1<<20, 0); err == nil && n == 0 {
			return f.Close()
		}
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
	}
	if errors.Is(err, unix.EINVAL) { // /dev/null
		return f.Close()
	}
	return err
}
