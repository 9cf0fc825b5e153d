// Package config reads the daemon's configuration: containerd's config.toml (versions 2 and 3), of which it honours
// what the daemon has, and says with file and line what it does not.
package config

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
)

// Versions of the file that are read; Version is the one that is written.
const (
	oldestVersion = 2
	Version       = 3
)

// Config is what the daemon is told. Every field stands in the table of keys (keys.go) with its meaning and its default.
type Config struct {
	Root, State     string
	GRPC            GRPC
	TTRPC           Socket
	Debug           Debug
	Metrics         Metrics
	OOMScore        int
	DisabledPlugins []string
	RequiredPlugins []string
	Imports         []string
	Overlayfs       Overlayfs
	Native          Snapshotter
	Btrfs           Snapshotter
	Erofs           Erofs
	Blockfile       Blockfile
	Devmapper       Devmapper
	Zfs             Snapshotter
	Proxies         map[string]Proxy     // by name
	Processors      map[string]Processor // by ID
	Differs         []string             // those of the diff service, and of unpacking
	Task            Task
	ContentSharing  string // shared or isolated
	GC              GC
	Transfer        Transfer
	Registry        Registry
	Verifier        Verifier
	Layers          Layers
}

// Layers is what a layer may become, see package diff; 0 is no limit. The time is a Go duration.
type Layers struct {
	MaxBytes, MaxEntries, MaxRatio int
	ProcessorStall                 string
}

// Verifier is which programs are asked whether an image may be pulled, see package verify. The timeout is a Go duration.
type Verifier struct {
	BinDir             string
	MaxVerifiers       int // less than 0: all
	PerVerifierTimeout string
}

// Socket is a Unix socket and who owns it.
type Socket struct {
	Address  string
	UID, GID int
}

// GRPC is the socket of the API; its limits are in bytes.
type GRPC struct {
	Socket
	MaxRecvMessageSize, MaxSendMessageSize int
}

// Debug is the log, and a socket for profiles when it has an address.
type Debug struct {
	Socket
	Level, Format string
}

// Metrics is a TCP address, HOST:PORT, or nothing.
type Metrics struct{ Address string }

// Task is what the part that runs shims can be told.
type Task struct {
	Shim         string
	UpgradeShims string // never, idle or always
}

// Transfer is how images are pulled and pushed, see package transfer; sizes are in bytes.
type Transfer struct {
	ConfigPath                 string // directories of hosts.toml, with colons between them
	Downloads, Ranges, Uploads int
	PartSize, ReceiveBuffer    int
	Unpacks                    []Unpack // in their order; the first that fits counts
}

// GC says when what nobody needs is collected, see package gc. The delays are Go durations.
type GC struct {
	PauseThreshold                       float64
	DeletionThreshold, MutationThreshold int
	ScheduleDelay, StartupDelay          string
}

// Delay reads a duration that Validate has found to be one.
func Delay(s string) time.Duration {
	d, _ := time.ParseDuration(s)
	return d
}

// Default is the configuration without a file.
func Default() *Config {
	c := &Config{}
	for _, k := range keys {
		set(k.field(c), k.def)
	}
	return c
}

// ShimPath is the shim binary that is configured, "" for the one beside the daemon or on PATH.
func (c *Config) ShimPath() string { return c.Task.Shim }

// maxSocketPath is what fits into sun_path (unix(7)), in bytes.
const maxSocketPath = 107

// Validate checks what can be checked without the machine. Its error, InvalidArgument, names every key that is wrong.
func (c *Config) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("configuration: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}
	for _, k := range keys {
		if k.check == nil {
			continue
		}
		if why := k.check(value(k.field(c))); why != "" {
			wrong("%s %s", k.name(), why)
		}
	}
	if c.Root != "" && filepath.Clean(c.Root) == filepath.Clean(c.State) {
		wrong("root and state are both %s: state must not outlive a reboot, root must", c.Root)
	}
	return errors.Join(errs...)
}

func absolute(v any) string {
	if p := v.(string); !filepath.IsAbs(p) {
		return fmt.Sprintf("%q must be an absolute path", p)
	}
	return ""
}

func absoluteOrNone(v any) string {
	if v.(string) == "" {
		return ""
	}
	return absolute(v)
}

func socketPath(v any) string {
	p := strings.TrimPrefix(v.(string), "unix://")
	if why := absolute(p); why != "" {
		return why
	}
	if len(p) > maxSocketPath {
		return fmt.Sprintf("%q is too long for a socket: %d bytes, at most %d", p, len(p), maxSocketPath)
	}
	return ""
}

func socketPathOrNone(v any) string {
	if v.(string) == "" {
		return ""
	}
	return socketPath(v)
}

func natural(v any) string {
	if n := v.(int); n < 0 {
		return fmt.Sprintf("%d must not be negative", n)
	}
	return ""
}

func duration(v any) string {
	s := v.(string)
	if d, err := time.ParseDuration(s); err != nil || d < 0 {
		return fmt.Sprintf("%q must be a duration such as 100ms or 2s, not negative", s)
	}
	return ""
}

func sizeOrNone(v any) string {
	if s := v.(string); s != "" {
		if n, err := units.RAMInBytes(s); err != nil || n <= 0 {
			return fmt.Sprintf("%q must be a size such as 512MB or 10GB", s)
		}
	}
	return ""
}

// Size reads a size that Validate has found to be one, in bytes.
func Size(s string) int64 {
	n, _ := units.RAMInBytes(s)
	return n
}

func positiveDuration(v any) string {
	if why := duration(v); why != "" {
		return why
	}
	if Delay(v.(string)) == 0 {
		return "must be more than 0"
	}
	return ""
}

func threshold(v any) string {
	if f := v.(float64); !(f >= 0 && f <= 0.5) {
		return fmt.Sprintf("%g is not between 0 and 0.5", f)
	}
	return ""
}

func oneOf(words ...string) func(any) string {
	return func(v any) string {
		if s := v.(string); s != "" && !slices.Contains(words, s) {
			return fmt.Sprintf("%q is none of %s", s, strings.Join(words, ", "))
		}
		return ""
	}
}

func oomScore(v any) string {
	if n := v.(int); n < -1000 || n > 1000 { // proc_pid_oom_score_adj(5)
		return fmt.Sprintf("%d is not between -1000 and 1000", n)
	}
	return ""
}

// WriteTo writes the configuration as a file that Load reads back, every key with its meaning.
func (c *Config) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	b.WriteString("# The configuration of managerd, in the form of containerd's config.toml.\n\nversion = ")
	fmt.Fprintf(&b, "%d\n", Version)
	table := ""
	for _, k := range keys {
		if t := k.tableName(); t != table {
			table = t
			fmt.Fprintf(&b, "\n[%s]\n", t)
		} else {
			b.WriteString("\n")
		}
		for line := range strings.SplitSeq(k.doc, "\n") {
			fmt.Fprintf(&b, "# %s\n", line)
		}
		fmt.Fprintf(&b, "%s = %s\n", k.path[len(k.path)-1], literal(value(k.field(c))))
	}
	c.writeUnpacks(&b)
	c.writeProxies(&b)
	c.writeProcessors(&b)
	old, err := c.Registry.Old.write()
	if err != nil {
		return 0, err
	}
	b.WriteString(old)
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}
