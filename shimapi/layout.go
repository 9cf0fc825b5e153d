package shimapi

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
)

// Names inside a bundle directory that both the daemon and the shim touch. The first group is containerd's
// (clients and node tools look for them), the second is ours.
const (
	ConfigFile    = "config.json"    // the OCI runtime spec
	RootfsDir     = "rootfs"         // where the shim mounts the task's rootfs
	LogFIFO       = "log"            // the shim's own log; opened O_RDWR so that a missing reader neither blocks nor kills
	InitPidFile   = "init.pid"       // decimal pid of the container's init
	BootstrapFile = "bootstrap.json" // BootstrapParams of the running shim
	AddressFile   = "address"        // its socket address, as containerd 1.x shims leave it
	OptionsFile   = "options.json"   // runtime options of the task, as containerd 1.x shims leave them

	// CursorFile is the daemon's: the sequence number of the last event that it has handed on, 8 bytes, little endian. The
	// shim may drop from its ledger what is up to it.
	CursorFile = "events.cursor"

	LedgerFile   = "ledger"   // exits and events (package shimapi/ledger)
	StdioDir     = "stdio"    // container-side FIFOs, named by StdioName
	TableDir     = "table"    // the shim's process table: one shimstate.Process per file, named by TableName
	BlackBoxFile = "blackbox" // what the shim did last (package shimapi/blackbox)
	StacksFile   = "stacks"   // the shim's goroutines as of the last SIGUSR1
	// CriuConfigFile is what criu reads beside its options (package criu of the shim's engines); its logs are those of
	// containerd: criu-dump.log, criu-restore.log.
	CriuConfigFile = "criu.conf"
	EngineDir      = "runc" // libcontainer's state root: EngineDir/ID/state.json

	// Of a sandbox's bundle.
	SandboxFile  = "sandbox.record" // a shimstate.Sandbox: what its shim keeps
	NamespaceDir = "ns"             // the namespaces that are held, by NamespaceName: files that are bind mounts of nsfs
	ShmDir       = "shm"            // where the members' /dev/shm is mounted
)

// NamespaceName is the file name, in NamespaceDir, of a namespace, by the type that the OCI runtime spec gives it; empty
// for one that no sandbox holds. It is the name of the link in /proc/PID/ns.
func NamespaceName(kind string) string {
	switch kind {
	case "network":
		return "net"
	case "ipc", "uts", "pid", "user":
		return kind
	}
	return ""
}

// StdioName is the file name, in StdioDir, of the FIFO that a process holds as its stream ("stdin", "stdout" or
// "stderr"). execID is empty for the init process; exec ids cannot begin with a dot, so the names never collide.
func StdioName(execID, stream string) string {
	if execID == "" {
		execID = ".init"
	}
	return execID + "." + stream
}

// TableName is the file name, in TableDir, of the record of a process. execID is empty for the init process.
func TableName(execID string) string {
	if execID == "" {
		return ".init"
	}
	return execID
}

// SandboxSocketPath is SocketPath for a sandbox, whose id may be a container's as well.
func SandboxSocketPath(state, ns, id string) string {
	return SocketPath(state, "sandboxes", filepath.Join(ns, id))
}

// SocketPath is where the shim of container id in namespace ns listens: STATE/s/HASH, short enough for sun_path
// wherever an instance of the daemon keeps its state (see Listen for state directories that are deeper).
func SocketPath(state, ns, id string) string {
	sum := sha256.Sum256([]byte(filepath.Join(state, ns, id)))
	return filepath.Join(state, "s", hex.EncodeToString(sum[:16]))
}

// FilterDir is where shims keep compiled seccomp filters for one another. It goes with a reboot, and may be removed at any time.
const FilterDir = "/run/shim-runc/seccomp"
