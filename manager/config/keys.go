package config

import (
	"bytes"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// key is one setting: where it stands in the file, where in Config, what it means.
type key struct {
	path  []string
	doc   string
	def   any               // string, int, float64, bool or []string
	field func(*Config) any // a pointer to def's type
	check func(any) string  // what is wrong with a value, as the rest of a sentence; nil when nothing can be
}

// Changed names the keys whose values differ, as the file writes them, in the order of the file.
func Changed(a, b *Config) []string {
	var names []string
	for i := range keys {
		if k := &keys[i]; !reflect.DeepEqual(k.field(a), k.field(b)) {
			names = append(names, k.name())
		}
	}
	if !reflect.DeepEqual(a.Proxies, b.Proxies) {
		names = append(names, proxySection)
	}
	if !reflect.DeepEqual(a.Transfer.Unpacks, b.Transfer.Unpacks) {
		names = append(names, joined(in(transferSection, unpackKey)))
	}
	if !reflect.DeepEqual(a.Processors, b.Processors) {
		names = append(names, processorSection)
	}
	for name, was := range a.Registry.Old.tables() {
		if !reflect.DeepEqual(was, b.Registry.Old.tables()[name]) {
			names = append(names, joined(in(criRegistry, name)))
		}
	}
	return names
}

// name is the key as the file writes it.
func (k *key) name() string { return joined(k.path) }

func (k *key) tableName() string { return joined(k.path[:len(k.path)-1]) }

// message is what clients are built for, in bytes.
const message = 16 << 20

var (
	boltSection     = []string{"plugins", "io.containerd.metadata.v1.bolt"}
	gcSection       = []string{"plugins", "io.containerd.gc.v1.scheduler"}
	transferSection = []string{"plugins", "io.containerd.transfer.v1.local"}
	walkingSection  = []string{"plugins", "io.containerd.differ.v1.walking"}
	verifierSection = []string{"plugins", "io.containerd.image-verifier.v1.bindir"}
	taskSection     = []string{"plugins", "io.containerd.runtime.v2.task"}
)

func in(section []string, name string) []string {
	return append(append([]string(nil), section...), name)
}

// keys is every setting there is, in the order of the file that is written.
var keys = slices.Concat(general, snapshotters, registryKeys)

var general = []key{
	{[]string{"root"}, "Directory of what survives a reboot: metadata, content, snapshots.", "/var/lib/managerd",
		func(c *Config) any { return &c.Root }, absolute},
	{[]string{"state"}, "Directory of what does not survive a reboot: sockets and bundles of running tasks. On a tmpfs.", "/run/managerd",
		func(c *Config) any { return &c.State }, absolute},
	{[]string{"oom_score"}, "What the daemon's oom_score_adj is set to; 0 leaves it alone.", 0,
		func(c *Config) any { return &c.OOMScore }, oomScore},
	{[]string{"disabled_plugins"}, "Parts that are not built, by their full names (mctl plugins ls).", []string{},
		func(c *Config) any { return &c.DisabledPlugins }, nil},
	{[]string{"required_plugins"}, "Parts without which the daemon does not start. Others are left out when they fail.", []string{},
		func(c *Config) any { return &c.RequiredPlugins }, nil},
	{[]string{"imports"}, "More files, with * and ? as in glob(7), relative to this one. They are read in order and override it;\nlists grow.", []string{},
		func(c *Config) any { return &c.Imports }, nil},

	{[]string{"grpc", "address"}, "Path of the socket that clients connect to.", "/run/managerd/managerd.sock",
		func(c *Config) any { return &c.GRPC.Address }, socketPath},
	{[]string{"grpc", "uid"}, "Owner of the socket.", 0, func(c *Config) any { return &c.GRPC.UID }, natural},
	{[]string{"grpc", "gid"}, "Group of the socket. Who may connect is root on this machine.", 0, func(c *Config) any { return &c.GRPC.GID }, natural},
	{[]string{"grpc", "max_recv_message_size"}, "Largest request, in bytes.", message,
		func(c *Config) any { return &c.GRPC.MaxRecvMessageSize }, natural},
	{[]string{"grpc", "max_send_message_size"}, "Largest answer, in bytes.", message,
		func(c *Config) any { return &c.GRPC.MaxSendMessageSize }, natural},

	{[]string{"ttrpc", "address"}, "Path of the socket that shims of others report to; empty for grpc.address with .ttrpc behind it.", "",
		func(c *Config) any { return &c.TTRPC.Address }, socketPathOrNone},
	{[]string{"ttrpc", "uid"}, "Owner of the socket.", 0, func(c *Config) any { return &c.TTRPC.UID }, natural},
	{[]string{"ttrpc", "gid"}, "Group of the socket.", 0, func(c *Config) any { return &c.TTRPC.GID }, natural},

	{[]string{"debug", "address"}, "Path of a socket for Go's profiles (/debug/pprof/); empty for none.", "",
		func(c *Config) any { return &c.Debug.Address }, socketPathOrNone},
	{[]string{"debug", "uid"}, "Owner of the socket.", 0, func(c *Config) any { return &c.Debug.UID }, natural},
	{[]string{"debug", "gid"}, "Group of the socket.", 0, func(c *Config) any { return &c.Debug.GID }, natural},
	{[]string{"debug", "level"}, "Least level that is logged: trace, debug, info, warn, error, fatal or panic. Shims log with debug and trace.", "info",
		func(c *Config) any { return &c.Debug.Level }, oneOf("trace", "debug", "info", "warn", "warning", "error", "fatal", "panic")},
	{[]string{"debug", "format"}, "How the log is written: text or json.", "text",
		func(c *Config) any { return &c.Debug.Format }, oneOf("text", "json")},

	{[]string{"metrics", "address"}, "HOST:PORT of Prometheus metrics (/v1/metrics); empty for none.", "",
		func(c *Config) any { return &c.Metrics.Address }, nil},

	{in(boltSection, "content_sharing_policy"), "Whether a namespace gets a blob that another one has by its digest alone (shared), or has to write it again (isolated).", "shared",
		func(c *Config) any { return &c.ContentSharing }, oneOf("shared", "isolated")},
	{in(gcSection, "pause_threshold"), "Greatest part of the time during which the collector may keep others from writing, 0 to 0.5.", 0.02,
		func(c *Config) any { return &c.GC.PauseThreshold }, threshold},
	{in(gcSection, "deletion_threshold"), "After how many deletions a collection does not wait for pause_threshold; 0: it always does.", 0,
		func(c *Config) any { return &c.GC.DeletionThreshold }, natural},
	{in(gcSection, "mutation_threshold"), "After how many changes a collection is due though nothing was deleted; 0: never.", 100,
		func(c *Config) any { return &c.GC.MutationThreshold }, natural},
	{in(gcSection, "schedule_delay"), "How long, after a deletion, a collection waits for more to do.", "1s",
		func(c *Config) any { return &c.GC.ScheduleDelay }, duration},
	{in(gcSection, "startup_delay"), "When, after the start of the daemon, the first collection is.", "100ms",
		func(c *Config) any { return &c.GC.StartupDelay }, duration},
	{in(transferSection, "config_path"), "Directories, with colons between them, that have a directory with a hosts.toml or certificates for a registry each; empty\nfor those of CRI's images.", "",
		func(c *Config) any { return &c.Transfer.ConfigPath }, nil},
	{in(transferSection, "max_concurrent_downloads"), "How many layers of one image are fetched at the same time.", 3,
		func(c *Config) any { return &c.Transfer.Downloads }, positiveNumber},
	{in(transferSection, "max_concurrent_ranges"), "By how many requests one layer is fetched at the same time.", 4,
		func(c *Config) any { return &c.Transfer.Ranges }, positiveNumber},
	{in(transferSection, "concurrent_layer_fetch_buffer"), "What one of these requests asks for, in bytes; a layer that is smaller is fetched by one.", 8 << 20,
		func(c *Config) any { return &c.Transfer.PartSize }, positiveNumber},
	{in(transferSection, "receive_buffer"), "How many bytes the kernel may have received for one of these requests ahead of the daemon: what is fetched again when the\ndaemon is killed. More is faster where a registry is far away; 0 leaves it to the kernel.", 128 << 10,
		func(c *Config) any { return &c.Transfer.ReceiveBuffer }, natural},
	{in(transferSection, "max_concurrent_uploaded_layers"), "How many layers of one image are sent at the same time.", 3,
		func(c *Config) any { return &c.Transfer.Uploads }, positiveNumber},
	{in(walkingSection, "max_layer_bytes"), "How many bytes a layer may have when it is unpacked, its files with their holes; 0: no limit.", 1 << 40,
		func(c *Config) any { return &c.Layers.MaxBytes }, natural},
	{in(walkingSection, "max_layer_entries"), "How many files, directories, links and whiteouts a layer may have; 0: no limit.", 10_000_000,
		func(c *Config) any { return &c.Layers.MaxEntries }, natural},
	{in(walkingSection, "max_layer_ratio"), "How many bytes a layer of more than 1 GiB may become for one of its blob; 0: no limit.", 10_000,
		func(c *Config) any { return &c.Layers.MaxRatio }, natural},
	{in(walkingSection, "processor_stall_timeout"), "How long a stream processor may neither read, nor write, nor end, before it is killed and the layer fails; 0s: no limit.", "2m",
		func(c *Config) any { return &c.Layers.ProcessorStall }, duration},
	{in(verifierSection, "bin_dir"), "Directory of programs that are asked whether an image may be pulled (docs/pull.md); it need not be there.", "/opt/containerd/image-verifier/bin",
		func(c *Config) any { return &c.Verifier.BinDir }, absolute},
	{in(verifierSection, "max_verifiers"), "How many of them are asked, in the order of their names; less than 0: all.", 10,
		func(c *Config) any { return &c.Verifier.MaxVerifiers }, nil},
	{in(verifierSection, "per_verifier_timeout"), "How long one of them may take.", "10s",
		func(c *Config) any { return &c.Verifier.PerVerifierTimeout }, positiveDuration},
	{[]string{"plugins", "io.containerd.service.v1.diff-service", "default"}, "Differs by which layers are applied, for clients and by the daemon itself, and made: walking, or proxy plugins of type\ndiff. Where one does not know how, the next is asked.", []string{"walking"},
		func(c *Config) any { return &c.Differs }, nil},
	{in(taskSection, "shim"), "Path of the shim for io.containerd.runc.v2; empty for shim-runc beside managerd, or else on PATH.", "",
		func(c *Config) any { return &c.Task.Shim }, absoluteOrNone},
	{in(taskSection, "upgrade_shims"), "Whether running shims of another version than that on disk are replaced in place after a start of the daemon: never, idle (those without execs) or always.", "never",
		func(c *Config) any { return &c.Task.UpgradeShims }, oneOf("never", "idle", "always")},
}

// ignored are the keys and sections of containerd that have no effect here, and why. A section ends with a dot, and
// stands for all that is below it.
var ignored = []struct{ prefix, why string }{
	{"version", ""}, // read apart
	{"plugin_dir", "Go plugins are not loaded"},
	{"temp", "temporary files stay below root and state"},
	{"cgroup.", "the daemon stays in the cgroup it was started in"},
	{"grpc.tcp_address", "the API is not served over TCP"},
	{"grpc.tcp_tls_ca", "the API is not served over TCP"},
	{"grpc.tcp_tls_cert", "the API is not served over TCP"},
	{"grpc.tcp_tls_key", "the API is not served over TCP"},
	{"grpc.tcp_tls_common_name", "the API is not served over TCP"},
	{"metrics.grpc_histogram", "there are no histograms of calls"},
	{"timeouts.", "shims that are killed or restarted need no time limits"},
	{"plugins." + snapshotterType + ".", "there is no such snapshotter, or it has no such setting"},
	{"plugins.io.containerd.runtime.v2.task.", "it has no such setting"},
	{"plugins.io.containerd.differ.v1.walking.", "it has no such setting"},
	{"plugins.io.containerd.image-verifier.v1.bindir.", "it has no such setting"},
	{"plugins.io.containerd.transfer.v1.local.", "it has no such setting"},
	{"plugins." + criImages + ".registry.", "it has no such setting"},
	{"plugins." + criPlugin + ".registry.", "it has no such setting"},
	{"plugins." + client + ".", "it has no such setting"},
	{"plugins.", "there is no such plugin"},
}

// set puts a value into the field it belongs to.
func set(field, v any) {
	switch f := field.(type) {
	case *string:
		*f = v.(string)
	case *int:
		*f = v.(int)
	case *float64:
		*f = v.(float64)
	case *bool:
		*f = v.(bool)
	case *[]string:
		*f = append([]string{}, v.([]string)...)
	default:
		panic(fmt.Sprintf("no such kind of setting: %T", field))
	}
}

// value is what a field holds.
func value(field any) any {
	switch f := field.(type) {
	case *string:
		return *f
	case *int:
		return *f
	case *float64:
		return *f
	case *bool:
		return *f
	case *[]string:
		return *f
	}
	panic(fmt.Sprintf("no such kind of setting: %T", field))
}

// literal writes a value as TOML does.
func literal(v any) string {
	switch v := v.(type) {
	case int:
		return strconv.Itoa(v)
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	case string:
		if plain.MatchString(v) {
			return `"` + v + `"`
		}
	case []string:
		quoted := make([]string, len(v))
		for i, s := range v {
			quoted[i] = literal(s)
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	}
	out, err := toml.Marshal(map[string]any{"k": v})
	if err != nil {
		panic(err) // a string always can be
	}
	return string(bytes.TrimSpace(out[len("k ="):]))
}

// plain is a string that stands for itself between quotes.
var plain = regexp.MustCompile(`^[ !#-\[\]-~]*$`)

// bare is a key that needs no quotes (TOML 1.0, "Keys").
var bare = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// joined writes a dotted key.
func joined(path []string) string {
	parts := make([]string, len(path))
	for i, p := range path {
		if bare.MatchString(p) {
			parts[i] = p
		} else {
			parts[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(p) + `"`
		}
	}
	return strings.Join(parts, ".")
}
