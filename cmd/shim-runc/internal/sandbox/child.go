package sandbox

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ChildVerb is the verb under which this program is the first process in new namespaces. The bundle follows, for those who
// look at a list of processes.
const ChildVerb = "sandbox-child"

// What the two say to each other: the child when all is set up, else a sentence why not; its maker when it may go on.
const (
	ready   = "ready"
	release = "go"
)

// childOrder is what the child is to set up, in the namespaces that are new.
type childOrder struct {
	Hostname, Domainname string
	Loopback             bool
	Init                 bool // stay, and be the init of the pid namespace
	Sysctl               map[string]string
}

// Child is the child: it sets the namespaces up, waits until they are pinned, and ends, or is an init until it is told to end
// (SIGTERM) or killed.
func Child(stdin *os.File, stdout *os.File) error {
	in := bufio.NewReader(stdin)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	var order childOrder
	if err := json.Unmarshal(line, &order); err != nil {
		return err
	}
	signals := make(chan os.Signal, 16)
	if order.Init { // before anybody could be told that there is one
		signal.Notify(signals, unix.SIGCHLD, unix.SIGTERM)
		signal.Ignore(unix.SIGINT, unix.SIGHUP, unix.SIGPIPE, unix.SIGQUIT)
	}
	answer := ready
	if err := order.carryOut(); err != nil {
		answer = strings.ReplaceAll(err.Error(), "\n", " ")
	}
	if _, err := fmt.Fprintln(stdout, answer); err != nil {
		return err
	}
	if said, err := in.ReadString('\n'); errors.Is(err, io.EOF) || said != release+"\n" {
		return errors.New("whoever made this process has died")
	}
	_, _ = stdin.Close(), stdout.Close()
	if order.Init {
		reap(signals)
	}
	return nil
}

func (o *childOrder) carryOut() error {
	if o.Hostname != "" {
		if err := unix.Sethostname([]byte(o.Hostname)); err != nil {
			return fmt.Errorf("cannot set hostname %q: %w", o.Hostname, err)
		}
	}
	if o.Domainname != "" {
		if err := unix.Setdomainname([]byte(o.Domainname)); err != nil {
			return fmt.Errorf("cannot set domainname %q: %w", o.Domainname, err)
		}
	}
	if o.Loopback {
		if err := upLoopback(); err != nil {
			return fmt.Errorf("cannot set the loopback interface up: %w", err)
		}
	}
	return writeSysctls(o.Sysctl)
}

func upLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, r); err != nil {
		return err
	}
	r.SetUint16(r.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// reap is an init's life: it takes the exits of orphans. Told to end, it passes that on to all, and ends when none is left;
// whoever lost patience kills it, and all others with it.
func reap(signals <-chan os.Signal) {
	for s := range signals {
		if s == unix.SIGTERM {
			_ = unix.Kill(-1, unix.SIGTERM)
			break
		}
		reapAll()
	}
	for { // processes that joined are others' children: nobody says when the last one is gone
		reapAll()
		if err := unix.Kill(-1, 0); errors.Is(err, unix.ESRCH) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func reapAll() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
	}
}
