// Package boot is the command line of shim-runc: containerd's verbs "start" and "delete", our "serve" and "adopt" (see
// package shimapi), and what a shim does around its service: listening, logging, forwarding events, ending.
package boot

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/managerd/managerd/cmd/shim-runc/internal/handover"
	"github.com/managerd/managerd/cmd/shim-runc/internal/sandbox"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/version"
)

// args is the command line, in containerd's spelling.
type args struct {
	namespace, id, bundle, address, publish, socket string
	debug, forward, version, info, sandbox          bool
	verb                                            string
}

// Main runs one verb and returns the exit status: 0, 1 after a failure, 2 for a command line that makes no sense.
func Main(argv []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(argv) > 0 && argv[0] == sandbox.ChildVerb {
		return child(stderr)
	}
	a, err := parse(argv, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		_, _ = fmt.Fprintf(stderr, "shim-runc: %v\n", err)
		return 2
	case a.version:
		_, _ = fmt.Fprintf(stdout, "shim-runc %s\n  revision: %s\n", version.Version, version.Revision)
		return 0
	case a.info:
		a.verb, err = "describe this runtime", info(stdin, stdout)
	}
	switch a.verb {
	case shimapi.VerbStart:
		err = start(a, stdin, stdout)
	case shimapi.VerbDelete:
		err = remove(a, stdout, stderr)
	case shimapi.VerbServe, shimapi.VerbAdopt:
		err = sandbox.Main(func() error { return serve(a) })
	case handover.CheckVerb:
		err = handover.Check(stdin, stdout)
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "shim-runc: cannot %s: %v\n", a.verb, err)
		return 1
	}
	return 0
}

// child is the first process in the namespaces of a sandbox.
func child(stderr io.Writer) int {
	if err := sandbox.Child(os.Stdin, os.Stdout); err != nil {
		_, _ = fmt.Fprintf(stderr, "shim-runc: %v\n", err)
		return 1
	}
	return 0
}

func parse(argv []string, stderr io.Writer) (*args, error) {
	a := &args{}
	f := flag.NewFlagSet("shim-runc", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&a.namespace, "namespace", "", "namespace of the container")
	f.StringVar(&a.id, "id", "", "id of the container")
	f.StringVar(&a.bundle, "bundle", "", "bundle directory (default: the working directory)")
	f.StringVar(&a.address, "address", "", "gRPC socket of the daemon")
	f.StringVar(&a.publish, "publish-binary", "", "accepted for containerd's sake; events go to "+shimapi.EnvTTRPCAddress)
	f.StringVar(&a.socket, "socket", "", "accepted for containerd's sake")
	f.BoolVar(&a.debug, "debug", false, "log more")
	f.BoolVar(&a.forward, "forward", false, "serve: forward events to "+shimapi.EnvTTRPCAddress)
	f.BoolVar(&a.sandbox, "sandbox", false, "serve, adopt: keep a sandbox, which containers share, instead of a container")
	f.BoolVar(&a.version, "version", false, "print the version")
	f.BoolVar(&a.version, "v", false, "print the version")
	f.BoolVar(&a.info, "info", false, "print a serialised RuntimeInfo; the runtime's options are read from stdin")
	f.Usage = func() {
		_, _ = fmt.Fprintf(stderr, "usage: shim-runc -namespace NS -id ID [flags] %s|%s|%s|%s\n\n", shimapi.VerbStart, shimapi.VerbDelete, shimapi.VerbServe, shimapi.VerbAdopt)
		f.PrintDefaults()
	}
	if err := f.Parse(argv); err != nil {
		return nil, err
	}
	if a.version || a.info {
		return a, nil
	}
	if f.NArg() > 1 {
		return nil, fmt.Errorf("one verb is expected, not %q (see -help)", f.Args())
	}
	switch a.verb = f.Arg(0); a.verb {
	case shimapi.VerbStart, shimapi.VerbDelete, shimapi.VerbServe, shimapi.VerbAdopt:
	case handover.CheckVerb: // asked by a shim that is to be replaced, of no container
		return a, nil
	case "":
		return nil, errors.New("no verb: a daemon runs this program with start, delete, serve or adopt (see -help)")
	default:
		return nil, fmt.Errorf("unknown verb %q: known are start, delete, serve and adopt", a.verb)
	}
	if a.namespace == "" || a.id == "" {
		return nil, fmt.Errorf("%s needs -namespace and -id", a.verb)
	}
	for flag, name := range map[string]string{"-namespace": a.namespace, "-id": a.id} {
		if name == "." || name == ".." || strings.ContainsRune(name, '/') {
			return nil, fmt.Errorf("%s %q is not a name: it is used as a file name", flag, name)
		}
	}
	if a.bundle == "" {
		wd, err := os.Getwd()
		if err != nil {
			return nil, err
		}
		a.bundle = wd
	}
	var err error
	a.bundle, err = filepath.Abs(a.bundle)
	return a, err
}
