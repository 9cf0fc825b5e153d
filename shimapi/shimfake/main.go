package shimfake

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/ledger"
	"github.com/managerd/managerd/shimapi/parking"
)

// EnvFaults names, in the environment of a fake that runs as a program, the directory that WriteFaults writes to. A test
// binary that finds it set, and was run with a verb, is to call Main.
const EnvFaults = "SHIMFAKE_FAULTS"

// Called says that this process is to be a fake: see Main.
func Called() bool {
	if os.Getenv(EnvFaults) == "" || len(os.Args) < 2 {
		return false
	}
	verb := os.Args[len(os.Args)-1]
	return verb == shimapi.VerbServe || verb == shimapi.VerbDelete || verb == shimapi.VerbAdopt
}

// Main is a fake as a program, with the verbs serve, delete and adopt of ours, and returns the exit status. The
// pseudo-method "Boot" fails before it serves. Only with the pseudo-method "Adopt", whatever goes wrong with that, does a
// fake take over from another one: its init runs on then, or has ended, as the ledger has it.
func Main() int {
	var cfg Config
	f := flag.NewFlagSet("shimfake", flag.ContinueOnError)
	f.StringVar(&cfg.Namespace, "namespace", "", "")
	f.StringVar(&cfg.ID, "id", "", "")
	f.StringVar(&cfg.Bundle, "bundle", "", "")
	for _, name := range []string{"address", "publish-binary"} {
		f.String(name, "", "")
	}
	f.Bool("debug", false, "")
	err := f.Parse(os.Args[1:])
	cfg.FaultDir = os.Getenv(EnvFaults)
	if err == nil {
		switch verb := f.Arg(0); verb {
		case shimapi.VerbServe:
			err = serve(cfg, nil)
		case shimapi.VerbDelete:
			err = remove(cfg)
		case shimapi.VerbAdopt:
			err = adopt(cfg)
		default:
			err = fmt.Errorf("unknown verb %q", verb)
		}
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "shimfake:", err)
		return 1
	}
	return 0
}

// adopt serves for another fake, which has died.
func adopt(cfg Config) error {
	faults, err := readFaults(cfg.FaultDir, cfg.ID)
	if err != nil {
		return err
	}
	if _, ok := faults["Adopt"]; !ok {
		return errors.New("a fake takes over only with a fault named Adopt")
	}
	parked := os.NewFile(parking.HandoverFD, "handover")
	if _, err := io.Copy(io.Discard, parked); err != nil { // descriptors too: a fake needs none
		return err
	}
	_ = parked.Close()
	init, err := pastInit(cfg)
	if err != nil {
		return err
	}
	return serve(cfg, init)
}

// pastInit is the init that the ledger knows; nil for none.
func pastInit(cfg Config) (*process, error) {
	records, err := ledger.Read(filepath.Join(cfg.Bundle, shimapi.LedgerFile))
	if err != nil {
		return nil, err
	}
	var p *process
	for _, r := range records {
		if n := r.Process; n != nil && n.ExecId == "" {
			p = &process{
				kind: shimapi.Init, state: shimapi.Running, exited: make(chan struct{}),
				stdin: n.Stdin, stdout: n.Stdout, stderr: n.Stderr, terminal: n.Terminal,
			}
		}
		if e := r.Exit; e != nil && e.ExecId == "" && p != nil {
			p.state, p.status, p.at = shimapi.Stopped, e.Status, time.Unix(0, e.ExitedUnixNano)
			close(p.exited)
		}
	}
	return p, nil
}

// serve is a fake until its Shutdown; init is that of a container which another one made, nil for none.
func serve(cfg Config, init *process) error {
	signal.Ignore(unix.SIGPIPE) // standard error is a FIFO whose reader is the daemon
	faults, err := readFaults(cfg.FaultDir, cfg.ID)
	if err != nil {
		return err
	}
	if boot, ok := faults["Boot"]; ok {
		if boot.Hang {
			signal.Ignore(unix.SIGTERM)
			for {
				_ = unix.Pause() // until SIGKILL
			}
		}
		return errors.New(boot.Message)
	}
	l, err := net.FileListener(os.NewFile(shimapi.ListenFD, "listener"))
	if err != nil {
		return err
	}
	s, err := newShim(cfg, l, init, func() { os.Exit(1) })
	if err != nil {
		return err
	}
	<-s.Ended()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_ = s.server.Shutdown(ctx) // answers and last events go out first; what takes longer is cut off
	s.Stop()
	return nil
}

// remove prints how the container ended.
func remove(cfg Config) error {
	resp := &task.DeleteResponse{ExitStatus: 137, ExitedAt: timestamppb.Now()}
	records, err := ledger.Read(filepath.Join(cfg.Bundle, shimapi.LedgerFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, r := range records {
		if p := r.Process; p != nil && p.ExecId == "" {
			resp.Pid = p.Pid
		}
		if e := r.Exit; e != nil && e.ExecId == "" {
			resp.ExitStatus, resp.ExitedAt = e.Status, timestamppb.New(time.Unix(0, e.ExitedUnixNano))
		}
	}
	out, err := proto.Marshal(resp)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(out)
	return err
}
