package registry

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

// host is an endpoint as one repository uses it.
type host struct {
	*endpoint
	r      *Registry
	domain string // of the reference: what a mirror is told
	repo   string // the reference's path
	last   bool   // nobody else is asked after it
	header http.Header
	debug  *Debug // nil: nobody wants to know
	client *auth.Client
}

const (
	maxRedirects  = 10
	maxErrorBody  = 64 << 10
	maxHeaderSize = 256 << 10
	firstBackoff  = 200 * time.Millisecond
)

// host prepares an endpoint. Its error is that of a file of its settings.
func (p *Repository) host(e *endpoint) (*host, error) {
	pool, err := p.r.pool(e.settings)
	if err != nil {
		return nil, err
	}
	h := &host{endpoint: e, r: p.r, domain: p.domain, repo: p.path, header: e.header.Clone(), debug: p.opts.Debug}
	for name, values := range p.opts.Headers {
		if e.mirror && http.CanonicalHeaderKey(name) == "Authorization" {
			continue
		}
		if h.header == nil {
			h.header = http.Header{}
		}
		h.header[http.CanonicalHeaderKey(name)] = values
	}
	who := &identity{
		host: e.base.Host,
		ask: func(ctx context.Context) (Credential, error) {
			if p.opts.Credentials != nil {
				if c, err := p.opts.Credentials(ctx, e.base.Host); err != nil || c != (Credential{}) {
					return c, err
				}
			}
			return p.r.configured(ctx, e.base.Host)
		},
		tokens: func(c auth.Credential) auth.Cache {
			return p.r.tokens.of(e.base.Scheme+"://"+e.base.Host, c, time.Now())
		},
	}
	h.client = &auth.Client{
		Client:     &http.Client{Transport: &transport{pool, h}, CheckRedirect: checkRedirect},
		Credential: who.Credential,
		Cache:      who,
		ClientID:   p.r.cfg.UserAgent,
	}
	if local, _ := loopback(e.base.Host); local { // its token server may be here too
		h.client.BlockedRealmPrefixes = slices.DeleteFunc(auth.DefaultBlockedRealmPrefixes(), func(p netip.Prefix) bool { return p.Addr().IsLoopback() })
	}
	return h, nil
}

// pool is the connections of everything with the same settings. Files that have changed make new ones.
func (r *Registry) pool(s settings) (*http.Transport, error) {
	key := fmt.Sprintf("%q", s.ca) + fmt.Sprintf("%q %t %s %q", s.client, s.skipVerify, s.dialTimeout, s.proxy)
	stamp := func(path string) {
		if info, err := os.Stat(path); err == nil {
			key += " " + info.ModTime().String()
		}
	}
	for _, path := range s.ca {
		stamp(path)
	}
	for _, pair := range s.client {
		stamp(pair[0])
		stamp(pair[1])
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.pools[key]; t != nil {
		return t, nil
	}
	config, err := s.tlsConfig()
	if err != nil {
		return nil, err
	}
	timeout := s.dialTimeout
	if timeout == 0 {
		timeout = r.cfg.DialTimeout
	}
	proxy := http.ProxyFromEnvironment
	if s.proxy != "" {
		u, err := url.Parse(s.proxy)
		if err != nil {
			return nil, fmt.Errorf("proxy %q: %w: %w", s.proxy, err, errdefs.ErrInvalidArgument)
		}
		proxy = http.ProxyURL(u)
	}
	if len(r.pools) >= maxPools {
		for k, t := range r.pools {
			t.CloseIdleConnections()
			delete(r.pools, k)
		}
	}
	t := &http.Transport{
		Proxy:                  proxy,
		DialContext:            (&net.Dialer{Timeout: timeout, KeepAlive: 15 * time.Second, Control: r.receiving}).DialContext,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    timeout,
		DisableCompression:     true, // a blob's bytes are the ones its digest is of
		ForceAttemptHTTP2:      r.cfg.ReceiveBuffer == 0,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        60 * time.Second,
		MaxResponseHeaderBytes: maxHeaderSize,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: r.cfg.StallTimeout},
	}
	r.pools[key] = t
	return t, nil
}

// receiving bounds what a connection receives ahead of its reader.
func (r *Registry) receiving(_, _ string, c syscall.RawConn) error {
	if r.cfg.ReceiveBuffer == 0 {
		return nil
	}
	var err error
	cerr := c.Control(func(fd uintptr) {
		// The kernel doubles it, for its own needs (socket(7)).
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, r.cfg.ReceiveBuffer/2)
	})
	return errors.Join(cerr, err)
}

// maxPools is how many different settings keep connections at once.
const maxPools = 64

// transport adds what belongs to an endpoint to the requests that go there, and to no other.
type transport struct {
	base *http.Transport
	h    *host
}

func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if w := watchOf(req.Context()); w != nil {
		w.kick()
	}
	req = req.Clone(req.Context())
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", t.h.r.cfg.UserAgent)
	}
	if t.h.isOwn(req.URL) {
		for name, values := range t.h.header {
			if name != "Authorization" || req.Header.Get(name) == "" {
				req.Header[name] = values
			}
		}
		if name := t.h.header.Get("Host"); name != "" {
			req.Host = name
		}
	}
	var resp *http.Response
	var err error
	if d := t.h.debug; d != nil {
		resp, err = d.roundTrip(t.base, req)
	} else {
		resp, err = t.base.RoundTrip(req)
	}
	if err == nil && resp.StatusCode == http.StatusUnauthorized {
		preferBearer(resp.Header)
	}
	return resp, err
}

// isOwn says whether a URL is at the endpoint, whichever of two schemes that speaks.
func (h *host) isOwn(u *url.URL) bool {
	return u.Host == h.base.Host && (u.Scheme == h.base.Scheme || h.maybePlain)
}

// preferBearer puts the challenge that can be met first, where a registry sends several.
func preferBearer(h http.Header) {
	const name = "Www-Authenticate"
	for _, scheme := range []string{"bearer", "basic"} {
		for _, v := range h[name] {
			if word, _, _ := strings.Cut(v, " "); strings.EqualFold(word, scheme) {
				h[name] = []string{v}
				return
			}
		}
	}
}

// checkRedirect bounds redirects. Credentials stay behind at another origin: auth.Client takes Authorization off, and
// transport adds nothing there.
func checkRedirect(req *http.Request, via []*http.Request) error {
	first := via[0].URL
	if len(via) > maxRedirects {
		return fmt.Errorf("redirected more than %d times, at last to %s: %w", maxRedirects, bare(req.URL), errdefs.ErrFailedPrecondition)
	}
	if first.Scheme == "https" && req.URL.Scheme != "https" && !strings.Contains(first.Path, "/blobs/") {
		return fmt.Errorf("redirected from HTTPS to %s, where anybody could answer: %w", bare(req.URL), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// url is where something of the repository is: "manifests", "latest".
func (h *host) url(parts ...string) *url.URL {
	u := h.base
	u.Path = strings.Join(append([]string{u.Path, h.repo}, parts...), "/")
	h.finish(&u)
	return &u
}

// finish gives a URL what a mirror wants to know, and the scheme that the endpoint was found to speak.
func (h *host) finish(u *url.URL) {
	if h.mirror {
		q := u.Query()
		q.Set("ns", h.domain)
		u.RawQuery = q.Encode()
	}
	if h.maybePlain {
		h.r.mu.Lock()
		if h.r.plain[h.base.Host] {
			u.Scheme = "http"
		}
		h.r.mu.Unlock()
	}
}

// scoped says what a request needs a token for: actions on the repository.
func (h *host) scoped(ctx context.Context, actions ...string) context.Context {
	return auth.AppendScopesForHost(ctx, h.base.Host, auth.ScopeRepository(h.repo, actions...))
}

// request is one without a body.
func (h *host) request(ctx context.Context, method string, u *url.URL) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	req.Header.Set("Accept-Encoding", "identity")
	return req, nil
}

// send makes a request once, with whatever tokens and redirects it takes. The caller closes the body of the answer, which
// has any status. Errors have their kind.
func (h *host) send(req *http.Request) (*http.Response, error) {
	limit := h.r.cfg.StallTimeout
	if req.Body != nil {
		limit *= 4 // a registry moves or hashes what it was sent before it answers
	}
	w := newWatch(req.Context(), limit)
	out := req.Clone(w.ctx)
	if req.Body != nil && req.GetBody != nil {
		out.GetBody = func() (io.ReadCloser, error) {
			body, err := req.GetBody()
			return &watchedUpload{body, w}, err
		}
		body, err := out.GetBody()
		if err != nil {
			w.end()
			return nil, err
		}
		out.Body = body
	}
	resp, err := h.client.Do(out)
	if err != nil && h.maybePlain && out.URL.Scheme == "https" && (errors.Is(err, http.ErrSchemeMismatch) || errors.As(err, new(tls.RecordHeaderError))) {
		h.r.mu.Lock()
		h.r.plain[h.base.Host] = true
		h.r.mu.Unlock()
		w.end()
		again := req.Clone(req.Context())
		again.URL.Scheme = "http"
		return h.send(again)
	}
	w.stop()
	if err != nil {
		err = explain(w.ctx, h.plainly(err))
		w.end()
		return nil, err
	}
	w.limit.Store(int64(h.r.cfg.StallTimeout))
	resp.Body = &watchedBody{resp.Body, w}
	return resp, nil
}

// plainly takes what was asked off an error of the HTTP client, and leaves where a redirect led to.
func (h *host) plainly(err error) error {
	e, ok := err.(*url.Error)
	if !ok {
		asked := errors.As(err, &e) && strings.Contains(e.URL, "://")
		if !asked && !errors.As(err, new(*errcode.ErrorResponse)) && !errors.Is(err, auth.ErrBasicCredentialNotFound) && !kinded(err) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrUnauthenticated) // of no request: a challenge that cannot be met
		}
		return err
	}
	if u, parsed := url.Parse(e.URL); parsed == nil && !h.isOwn(u) {
		return fmt.Errorf("redirected to %s: %w", bare(u), e.Err)
	}
	return e.Err
}

// Do makes a request, again where that may help: the way to the endpoint failed, or it says that it is overloaded. An
// endpoint after which there are others is left sooner. The answer may have any status.
func (h *host) Do(req *http.Request) (*http.Response, error) { return h.do(req, h.again) }

// do is Do with another opinion of what may help.
func (h *host) do(req *http.Request, again func(*http.Response, error, int) (bool, time.Duration)) (*http.Response, error) {
	attempts := 2
	if h.last {
		attempts = h.r.cfg.Attempts
	}
	var waited time.Duration
	for n := 1; ; n++ {
		resp, err := h.send(req)
		worth, wait := again(resp, err, n)
		if !worth || n >= attempts || waited+wait > h.r.cfg.MaxRetryAfter {
			h.note(req.Context(), resp, err)
			return resp, err
		}
		if resp != nil {
			_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBody)
			_ = resp.Body.Close()
		}
		waited += wait
		h.r.log.Debug("a registry is asked again", "method", req.Method, "url", bare(req.URL), "in", wait, "error", err)
		select {
		case <-time.After(wait):
		case <-req.Context().Done():
			return nil, context.Cause(req.Context())
		}
	}
}

// again says whether a request is worth another try, and when.
func (h *host) again(resp *http.Response, err error, n int) (bool, time.Duration) {
	wait := firstBackoff << (n - 1)
	wait += time.Duration(rand.Int64N(int64(wait) / 2))
	if err != nil {
		var stall *StallError
		return errdefs.IsUnavailable(err) && !errors.Is(err, context.Canceled) && !errors.As(err, new(noHostError)) && (n < 2 || !errors.As(err, &stall)), wait
	}
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if asked := retryAfter(resp.Header, time.Now()); asked > 0 {
			return h.last, asked
		}
		return h.last || resp.StatusCode != http.StatusTooManyRequests, wait
	case http.StatusInternalServerError, http.StatusBadGateway, http.StatusGatewayTimeout, http.StatusRequestTimeout:
		return true, wait
	}
	return false, 0
}

// note tells the breaker how an endpoint is.
func (h *host) note(ctx context.Context, resp *http.Response, err error) {
	switch {
	case ctx.Err() != nil:
	case err != nil && unreachable(err):
		h.r.breaker.failed(h.String(), err, time.Now())
	case err == nil && (resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests):
		h.r.breaker.failed(h.String(), fmt.Errorf("it answered %s: %w", resp.Status, kindOf(resp.StatusCode)), time.Now())
	case err == nil:
		h.r.breaker.served(h.String())
	}
}

// retryAfter reads Retry-After, seconds or a date (RFC 9110, 10.2.3); 0 for none.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	if n, err := strconv.ParseInt(v, 10, 32); err == nil {
		return time.Duration(max(n, 0)) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(t.Sub(now), 0)
	}
	return 0
}

// refused makes an answer that does not serve an error, and closes it.
func (h *host) refused(resp *http.Response) error {
	defer resp.Body.Close()
	asked := bare(resp.Request.URL)
	if h.isOwn(resp.Request.URL) {
		asked = resp.Request.URL.Path
	}
	e := &StatusError{Method: resp.Request.Method, URL: asked, Status: resp.StatusCode, RetryAfter: retryAfter(resp.Header, time.Now())}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if errs := registryErrors(body); len(errs) > 0 {
		e.Codes, e.Message = codes(errs), message(errs)
	} else if isPage(resp) {
		e.Message = "a web page, not a registry's answer"
	} else {
		e.Message = firstLine(body)
	}
	if e.Message == "" && e.Status == http.StatusBadRequest && resp.Request.URL.Scheme == "http" {
		e.Message = "it was asked with plain HTTP; does it speak HTTPS?"
	}
	return e
}

// isPage says whether an answer is HTML.
func isPage(resp *http.Response) bool {
	t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return t == "text/html" || t == "application/xhtml+xml"
}

// bare is a URL without query and user, which may be secret.
func bare(u *url.URL) string {
	if u == nil {
		return ""
	}
	b := *u
	b.RawQuery, b.User, b.Fragment = "", nil, ""
	return b.String()
}

// firstLine is the beginning of a text, printable.
func firstLine(body []byte) string {
	line, _, _ := bytes.Cut(bytes.TrimSpace(body), []byte("\n"))
	s := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			return -1
		}
		return r
	}, string(line[:min(len(line), 200)]))
	return strings.TrimSpace(s)
}
