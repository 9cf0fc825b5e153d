// Package registry talks to image registries: the OCI distribution spec 1.1 and Docker's HTTP API V2. It finds the
// endpoints of a reference (hosts.toml, mirrors, the registry itself), authenticates, retries, resumes, and says of every
// endpoint why it did not serve. It stores nothing, and knows nothing of images beyond descriptors.
package registry

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config is what all requests share. A zero field stands for the default named with it.
type Config struct {
	ConfigPath   []string // directories of host directories, see docs/registry.md; the first that has one for a registry holds
	Legacy       Legacy   // CRI's registry configuration before hosts.toml; used when ConfigPath has nothing for a registry
	DockerConfig string   // a Docker config.json with credentials and credential helpers; "" for none
	UserAgent    string   // managerd
	Logger       *slog.Logger

	DialTimeout   time.Duration // for connection and TLS handshake each; 15 s; hosts.toml's dial_timeout overrides it
	StallTimeout  time.Duration // how long an answer may bring no byte; 30 s
	MaxRetryAfter time.Duration // the longest that a registry may ask us to wait before the request fails; 60 s
	BreakFor      time.Duration // how long a mirror is skipped after it failed, doubled for each failure up to 16 times; 15 s
	Attempts      int           // requests to the last endpoint, and openings of a stream without a byte between them; 5
	ManifestLimit int64         // bytes of a manifest or index; 4 MiB
	// ReceiveBuffer is how many bytes a connection may have received that nobody has read: what is lost of each with the
	// process. Requests have connections of their own then, HTTP/1.1. 0 leaves it to the kernel, and requests share
	// connections where the registry speaks HTTP/2.
	ReceiveBuffer int
	ChunkSize     int64 // bytes of one request of an upload, of which a failure repeats the last; 64 MiB
}

// Registry is one for a daemon: it keeps connections, tokens, and which endpoints are dead. Its methods may be called
// from several goroutines.
type Registry struct {
	cfg     Config
	log     *slog.Logger
	breaker breaker
	tokens  tokens
	legacy  legacy
	mu      sync.Mutex
	pools   map[string]*http.Transport // by settings, guarded by mu
	plain   map[string]bool            // hosts found to speak HTTP where both were possible, guarded by mu
}

// Credential is what a registry is shown. With a Header alone it stands for an Authorization header, Basic or Bearer.
type Credential struct {
	Username, Password string
	RefreshToken       string // an identity token, exchanged for access tokens
	AccessToken        string // a registry token, used as it is
	Header             string
}

// Options are those of one pull or push.
type Options struct {
	// Credentials answers for HOST[:PORT] of an endpoint that wants to know who asks, once per host and Repository. Without
	// it, or for the zero Credential, those of the configuration hold. docker.io's host is registry-1.docker.io.
	Credentials func(ctx context.Context, host string) (Credential, error)
	PlainHTTP   bool        // the registry itself is asked over HTTP; endpoints of hosts.toml say how they are asked
	SkipVerify  bool        // certificates are not verified, nor is it asked whose they are
	HostDir     string      // instead of Config.ConfigPath
	Headers     http.Header // sent to every endpoint, but Authorization to the registry itself only
	// Progress is called while Push sends, with how many bytes the registry has taken so far. It may fall back when
	// an upload is begun anew.
	Progress func(desc ocispec.Descriptor, sent int64)
	Debug    *Debug // if not nil, is told of everything that is asked
}

// New returns a client. It reads no file: host directories are read with each Repository, so that a change needs no
// restart.
func New(cfg Config) *Registry {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&cfg.DialTimeout, 15*time.Second)
	def(&cfg.StallTimeout, 30*time.Second)
	def(&cfg.MaxRetryAfter, 60*time.Second)
	def(&cfg.BreakFor, 15*time.Second)
	if cfg.Attempts <= 0 {
		cfg.Attempts = 5
	}
	if cfg.ManifestLimit <= 0 {
		cfg.ManifestLimit = 4 << 20
	}
	if cfg.ChunkSize <= 0 {
		cfg.ChunkSize = 64 << 20
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "managerd"
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Registry{cfg: cfg, log: cfg.Logger, pools: map[string]*http.Transport{}, plain: map[string]bool{}}
	r.breaker.first = cfg.BreakFor
	r.legacy = newLegacy(cfg.Legacy)
	return r
}

// Close ends idle connections. Streams that are open stay so.
func (r *Registry) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.pools {
		t.CloseIdleConnections()
	}
}
