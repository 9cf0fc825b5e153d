package shimapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A shim is spawned in one of two ways.
//
// Containerd's contract: the binary is run with the verb "start" (flags -namespace, -address, -publish-binary, -id,
// -debug, then the verb; working directory = the bundle; TTRPC_ADDRESS and friends in the environment; the task's
// options on stdin). It starts the long-lived process itself and prints where that listens: BootstrapParams as
// JSON, or for version 2 and before the bare address. "delete" cleans up after a shim that died and prints a
// serialised DeleteResponse.
//
// Ours, one exec and no round trip: the daemon binds the socket, and runs the binary with the verb "serve" and the
// flags -namespace, -id, -bundle; the listening socket is descriptor ListenFD. The daemon may connect at once: the
// kernel queues until the shim accepts. A shim spawned so forwards no events; the daemon reads them from the
// ledger stream (managerd.shim.v1.Shim/Events).
//
// "adopt" is "serve" for a bundle whose shim has died: the successor takes over what that kept, by what stands in the
// bundle and by what was parked with the daemon, which it receives at descriptor parking.HandoverFD if that is open. It
// ends at once, with status 1, when another shim keeps the bundle, or nothing in it is to be kept.
const (
	VerbStart  = "start"
	VerbDelete = "delete"
	VerbServe  = "serve"
	VerbAdopt  = "adopt"

	// ListenFD is the descriptor number of the listening socket under VerbServe and VerbAdopt.
	ListenFD = 3

	// AnnotationServe, in the RuntimeInfo that "-info" prints, announces that a shim knows VerbServe.
	AnnotationServe = "io.managerd.shim.serve"

	// EnvTTRPCAddress names containerd's event socket (a path) in a shim's environment.
	EnvTTRPCAddress = "TTRPC_ADDRESS"
	// EnvGRPCAddress names the daemon's gRPC socket.
	EnvGRPCAddress = "GRPC_ADDRESS"
	// EnvNamespace names the namespace.
	EnvNamespace = "NAMESPACE"
)

// BootstrapParams says where a shim listens; containerd's JSON form, printed by "start" and kept in BootstrapFile.
type BootstrapParams struct {
	Version  int    `json:"version"`  // of the task API: 2 or 3
	Address  string `json:"address"`  // "unix:///path" or "vsock://CID:PORT"
	Protocol string `json:"protocol"` // "ttrpc" or "grpc"
}

// ParseBootstrap reads what a shim's "start" printed: JSON, or the bare address of a version 2 shim.
func ParseBootstrap(out []byte) (BootstrapParams, error) {
	out = bytes.TrimSpace(out)
	if len(out) == 0 {
		return BootstrapParams{}, fmt.Errorf("shim printed no address")
	}
	p := BootstrapParams{Version: 2, Protocol: "ttrpc"}
	if out[0] != '{' {
		p.Address = string(out)
	} else if err := json.Unmarshal(out, &p); err != nil {
		return BootstrapParams{}, fmt.Errorf("cannot parse bootstrap parameters %q: %w", clip(out), err)
	}
	if p.Version < 2 || p.Version > 3 {
		return BootstrapParams{}, fmt.Errorf("shim speaks task API version %d, known are 2 and 3", p.Version)
	}
	if p.Protocol == "" {
		p.Protocol = "ttrpc"
	}
	if p.Protocol != "ttrpc" {
		return BootstrapParams{}, fmt.Errorf("shim speaks protocol %q, known is ttrpc", p.Protocol)
	}
	if err := p.check(); err != nil {
		return BootstrapParams{}, err
	}
	return p, nil
}

func (p BootstrapParams) check() error {
	if strings.HasPrefix(p.Address, vsockPrefix) {
		_, err := parseVsock(p.Address)
		return err
	}
	if !strings.HasPrefix(p.Address, "unix://") || len(p.Address) == len("unix://") {
		return fmt.Errorf("shim address %q is not of the form unix:///path", clip([]byte(p.Address)))
	}
	// It is kept in a file, logged and used as a path.
	if !utf8.ValidString(p.Address) || strings.ContainsFunc(p.Address, unicode.IsControl) {
		return fmt.Errorf("shim address %q is no path: it has bytes that cannot be printed", clip([]byte(p.Address)))
	}
	return nil
}

// clip keeps untrusted text short in an error.
func clip(b []byte) []byte {
	const most = 200
	if len(b) > most {
		return append(b[:most:most], "..."...)
	}
	return b
}
