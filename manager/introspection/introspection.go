// Package introspection knows what this daemon consists of: its plugins in containerd's words (type, id), which of them
// work, and which instance this is. It is told by the server that builds them.
package introspection

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
)

// Types of plugins, as containerd's clients know them.
const (
	TypeContent     = "io.containerd.content.v1"
	TypeMetadata    = "io.containerd.metadata.v1"
	TypeEvent       = "io.containerd.event.v1"
	TypeSnapshotter = "io.containerd.snapshotter.v1"
	TypeDiff        = "io.containerd.differ.v1"
	TypeLease       = "io.containerd.lease.v1"
	TypeGC          = "io.containerd.gc.v1"
	TypeRuntime     = "io.containerd.runtime.v2"
	TypeSandbox     = "io.containerd.sandbox.controller.v1"
	TypeVerifier    = "io.containerd.image-verifier.v1"
	TypeTransfer    = "io.containerd.transfer.v1"
	TypeStreaming   = "io.containerd.streaming.v1"
	TypeGRPC        = "io.containerd.grpc.v1"
	TypeTTRPC       = "io.containerd.ttrpc.v1"
)

// Plugin is one part of the daemon.
type Plugin struct {
	Type, ID     string
	Requires     []string          // types
	Platforms    []string          // such as linux/amd64; empty: it does not depend on one
	Exports      map[string]string // such as where a snapshotter stores
	Capabilities []string
	Warn         func() string // what somebody should look at, though it works; nil, or empty: nothing
	Err          error         // why it does not work; one that wraps NotImplemented means that this machine cannot
}

// Skipped tells whether the plugin is left out because this machine cannot have it, which is nobody's failure.
func (p Plugin) Skipped() bool { return errdefs.IsNotImplemented(p.Err) }

// Warning is what somebody should look at, though the plugin works; empty for nothing.
func (p Plugin) Warning() string {
	if p.Warn == nil || p.Err != nil {
		return ""
	}
	return p.Warn()
}

// Name is the plugin's full name, as configuration files spell it: TYPE.ID.
func (p Plugin) Name() string { return p.Type + "." + p.ID }

// Field lets filters look at a plugin: type, id, platforms, capabilities.
func (p Plugin) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "type":
		return p.Type, p.Type != ""
	case "id":
		return p.ID, p.ID != ""
	case "platforms":
		return strings.Join(p.Platforms, ","), len(p.Platforms) > 0
	case "capabilities":
		return strings.Join(p.Capabilities, ","), len(p.Capabilities) > 0
	}
	return "", false
}

// Registry is the list of plugins, in the order in which they were built.
type Registry struct {
	mu      sync.Mutex
	plugins []Plugin
}

// Add enters a plugin.
func (r *Registry) Add(p Plugin) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.plugins = append(r.plugins, p)
}

// List gives the plugins that match any of the filters.
func (r *Registry) List(fs ...string) ([]Plugin, error) {
	f, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []Plugin
	for _, p := range r.plugins {
		if f.Match(p) {
			found = append(found, p)
		}
	}
	return found, nil
}

// Get gives one plugin. NotFound when there is none.
func (r *Registry) Get(typ, id string) (Plugin, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.plugins {
		if p.Type == typ && p.ID == id {
			return p, nil
		}
	}
	return Plugin{}, fmt.Errorf("plugin %s.%s: %w", typ, id, errdefs.ErrNotFound)
}

// uuidFile is where containerd's tools expect the identity of a daemon's root directory.
const uuidFile = "io.containerd.grpc.v1.introspection/uuid"

// Identity gives the UUID of the daemon that owns root, and makes one (RFC 9562, version 4) when it has none yet.
func Identity(root string) (string, error) {
	path := filepath.Join(root, uuidFile)
	if data, err := os.ReadFile(path); err == nil {
		if id := string(bytes.TrimSpace(data)); len(id) == 36 {
			return id, nil
		}
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	id := strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", fmt.Errorf("cannot store the identity of %s: %w", root, err)
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, []byte(id), 0o600); err != nil {
		return "", fmt.Errorf("cannot store the identity of %s: %w", root, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return "", fmt.Errorf("cannot store the identity of %s: %w", root, err)
	}
	return id, nil
}

// PIDNamespace is the inode number that names the process's pid namespace, 0 when /proc does not tell.
func PIDNamespace() uint64 {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return 0
	}
	return st.Ino
}
