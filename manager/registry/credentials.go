package registry

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// configured is the credential of a host in the configuration, zero where there is none. Docker's file is read anew each
// time, and its helpers are run.
func (r *Registry) configured(ctx context.Context, host string) (Credential, error) {
	if c, ok := r.legacy.credentials[host]; ok {
		return c, nil
	}
	if r.legacy.wrong != nil {
		return Credential{}, r.legacy.wrong
	}
	if r.cfg.DockerConfig == "" {
		return Credential{}, nil
	}
	return DockerCredential(ctx, r.cfg.DockerConfig, host)
}

// DockerCredential is what a config.json of Docker's has for HOST[:PORT], by itself or by the helper that it names. It is
// zero when there is nothing, or no such file. docker.io's host is registry-1.docker.io. Errors: InvalidArgument for the
// file, Unauthenticated for its helper.
func DockerCredential(ctx context.Context, file, host string) (Credential, error) {
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return Credential{}, nil
	}
	store, err := credentials.NewStore(file, credentials.StoreOptions{})
	if err != nil {
		return Credential{}, fmt.Errorf("%s: %w: %w", file, err, errdefs.ErrInvalidArgument)
	}
	c, err := store.Get(ctx, credentials.ServerAddressFromHostname(host))
	if err != nil {
		return Credential{}, fmt.Errorf("%s: credential of %s: %w: %w", file, host, err, errdefs.ErrUnauthenticated)
	}
	return Credential{Username: c.Username, Password: c.Password, RefreshToken: c.RefreshToken, AccessToken: c.AccessToken}, nil
}

// plainForm takes a Header apart.
func (c Credential) plainForm() (auth.Credential, error) {
	out := auth.Credential{Username: c.Username, Password: c.Password, RefreshToken: c.RefreshToken, AccessToken: c.AccessToken}
	if c.Header == "" {
		return out, nil
	}
	scheme, rest, _ := strings.Cut(strings.TrimSpace(c.Header), " ")
	rest = strings.TrimSpace(rest)
	switch strings.ToLower(scheme) {
	case "bearer":
		out.AccessToken = rest
	case "basic":
		var err error
		if out.Username, out.Password, err = decodeBasic(rest); err != nil {
			return out, fmt.Errorf("the Authorization header: %w", err)
		}
	default:
		return out, fmt.Errorf("the Authorization header of scheme %q, which is neither Basic nor Bearer: %w", scheme, errdefs.ErrInvalidArgument)
	}
	return out, nil
}

// tokenLife is how long tokens are kept, of whichever registry; one that expires before is fetched anew when it is refused.
const tokenLife = 30 * time.Minute

// tokens keeps what registries gave, apart for each credential: nobody gets a token that another one's password bought.
type tokens struct {
	mu     sync.Mutex
	caches map[string]*tokenCache // by host and credential, guarded by mu
}

type tokenCache struct {
	auth.Cache
	born time.Time
}

// of is the cache of a host and credential.
func (t *tokens) of(host string, c auth.Credential, now time.Time) auth.Cache {
	data, _ := json.Marshal(c) // strings only
	sum := sha256.Sum256(data)
	key := host + " " + string(sum[:])
	t.mu.Lock()
	defer t.mu.Unlock()
	if cached := t.caches[key]; cached != nil && now.Sub(cached.born) < tokenLife {
		return cached.Cache
	}
	if t.caches == nil {
		t.caches = map[string]*tokenCache{}
	}
	for k, cached := range t.caches {
		if now.Sub(cached.born) >= tokenLife {
			delete(t.caches, k)
		}
	}
	cached := &tokenCache{Cache: auth.NewCache(), born: now}
	t.caches[key] = cached
	return cached.Cache
}

// identity is who a repository is at one host: asked for when the host first wants to know, and then remembered. At any
// other, where a registry may send an upload, it is nobody.
type identity struct {
	host   string
	ask    func(ctx context.Context) (Credential, error)
	tokens func(auth.Credential) auth.Cache
	mu     sync.Mutex
	cache  auth.Cache // nil until it is known, guarded by mu
	cred   auth.Credential
}

// Credential is an auth.CredentialFunc.
func (i *identity) Credential(ctx context.Context, host string) (auth.Credential, error) {
	if host != i.host {
		return auth.EmptyCredential, nil
	}
	if _, err := i.known(ctx); err != nil {
		return auth.EmptyCredential, err
	}
	return i.cred, nil
}

// known asks who it is, the first time. Somebody may have to type a password: no request is given up for that.
func (i *identity) known(ctx context.Context) (auth.Cache, error) {
	if w := watchOf(ctx); w != nil {
		w.stop()
		defer w.kick()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.cache != nil {
		return i.cache, nil
	}
	c, err := i.ask(ctx)
	if err != nil {
		if !kinded(err) && ctx.Err() == nil {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrUnauthenticated)
		}
		return nil, err
	}
	if i.cred, err = c.plainForm(); err != nil {
		return nil, err
	}
	i.cache = i.tokens(i.cred)
	return i.cache, nil
}

// GetScheme is of auth.Cache: nothing is known of a host that has not asked yet.
func (i *identity) GetScheme(ctx context.Context, host string) (auth.Scheme, error) {
	i.mu.Lock()
	cache := i.cache
	i.mu.Unlock()
	if cache == nil || host != i.host {
		return auth.SchemeUnknown, errdefs.ErrNotFound
	}
	return cache.GetScheme(ctx, host)
}

// GetToken is of auth.Cache.
func (i *identity) GetToken(ctx context.Context, host string, s auth.Scheme, key string) (string, error) {
	if host != i.host {
		return "", errdefs.ErrNotFound
	}
	cache, err := i.known(ctx)
	if err != nil {
		return "", err
	}
	return cache.GetToken(ctx, host, s, key)
}

// Set is of auth.Cache.
func (i *identity) Set(ctx context.Context, host string, s auth.Scheme, key string, fetch func(context.Context) (string, error)) (string, error) {
	if host != i.host {
		return fetch(ctx)
	}
	cache, err := i.known(ctx)
	if err != nil {
		return "", err
	}
	return cache.Set(ctx, host, s, key, fetch)
}
