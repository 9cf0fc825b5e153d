package regproxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Proxy stands before a registry, and fails where it is told to.
type Proxy struct {
	Addr, URL string
	backend   *url.URL
	client    *http.Transport
	gone      chan struct{} // closed at the end

	mu     sync.Mutex
	faults []*Fault
	seen   []Seen
	sent   *atomic.Int64 // since Heal
}

// Seen is a request that came.
type Seen struct {
	Method, Path, Query string
	Header              http.Header
}

// Fault is what goes wrong with requests.
type Fault struct {
	Method string // "" for any
	Path   string // what it has in it
	Times  int    // how often, 0 for always
	After  int    // how many such requests pass before

	// One of these; most say what becomes of the answer.
	Do       http.HandlerFunc // answers by itself
	Delay    time.Duration    // before anything else
	Reset    int64            // resets the connection after so many bytes of the body, from 1; with a Method other than GET, of the request's
	Truncate int64            // closes it after so many
	Stall    int64            // sends nothing more after so many
	Rewrite  func(*http.Response)
	Request  func(*http.Request) // changes what is asked of the registry

	hits int
}

// inFlight is about how many bytes the kernel keeps of what was sent and has not arrived.
const inFlight = 64 << 10

// Before starts a proxy before a registry. With server it speaks HTTPS.
func Before(t testing.TB, r *Registry, server *tls.Config) *Proxy {
	t.Helper()
	backend, err := url.Parse(r.URL())
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{backend: backend, client: &http.Transport{TLSClientConfig: r.ClientTLS(), DisableCompression: true}, gone: make(chan struct{}), sent: &atomic.Int64{}}
	s := httptest.NewUnstartedServer(p)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if t, ok := c.(interface{ SetWriteBuffer(int) error }); ok {
			_ = t.SetWriteBuffer(inFlight) // a reset loses what is there: it was sent, and nobody gets it
		}
		return ctx
	}
	if server != nil {
		s.TLS = server
		s.StartTLS()
	} else {
		s.Start()
	}
	p.URL, p.Addr = s.URL, s.Listener.Addr().String()
	t.Cleanup(func() {
		close(p.gone)
		s.CloseClientConnections()
		s.Close()
		p.client.CloseIdleConnections()
	})
	return p
}

// Add makes more go wrong. The first fault that fits a request, and is not used up, is done to it.
func (p *Proxy) Add(faults ...Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range faults {
		p.faults = append(p.faults, &f)
	}
}

// Heal forgets all faults and what was seen.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults, p.seen, p.sent = nil, nil, &atomic.Int64{}
}

// Seen are the requests that came, of a method and with something in their path.
func (p *Proxy) Seen(method, path string) []Seen {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []Seen
	for _, s := range p.seen {
		if (method == "" || s.Method == method) && strings.Contains(s.Path, path) {
			out = append(out, s)
		}
	}
	return out
}

// Sent is how many bytes of bodies went to clients.
func (p *Proxy) Sent() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sent.Load()
}

func (p *Proxy) fault(r *http.Request) (*Fault, *atomic.Int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = append(p.seen, Seen{r.Method, r.URL.Path, r.URL.RawQuery, r.Header.Clone()})
	for _, f := range p.faults {
		if f.Method != "" && f.Method != r.Method || !strings.Contains(r.URL.Path, f.Path) {
			continue
		}
		f.hits++
		if f.hits <= f.After || f.Times > 0 && f.hits > f.After+f.Times {
			continue
		}
		return f, p.sent
	}
	return &Fault{}, p.sent
}

func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f, sent := p.fault(r)
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-r.Context().Done():
			return
		case <-p.gone:
			return
		}
	}
	if f.Do != nil {
		f.Do(w, r)
		return
	}
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host, out.RequestURI = p.backend.Scheme, p.backend.Host, ""
	if r.ContentLength == 0 {
		out.Body = nil
	} else if f.Method != "" && f.Method != http.MethodGet {
		out.Body = upload(r, f)
	}
	if f.Request != nil {
		f.Request(out)
	}
	resp, err := p.client.RoundTrip(out)
	if err != nil {
		if f.Reset > 0 {
			reset(w)
			panic(http.ErrAbortHandler)
		}
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	if f.Rewrite != nil {
		f.Rewrite(resp)
	}
	for name, values := range resp.Header {
		w.Header()[name] = values
	}
	w.WriteHeader(resp.StatusCode)
	p.copy(w, r, resp.Body, f, sent)
}

// copy sends a body, as far as the fault lets it.
func (p *Proxy) copy(w http.ResponseWriter, r *http.Request, body io.Reader, f *Fault, sent *atomic.Int64) {
	limit := max(f.Reset, f.Truncate, f.Stall)
	if limit > 0 {
		body = io.LimitReader(body, limit)
	}
	n, err := io.Copy(w, body)
	sent.Add(n)
	if err != nil || limit == 0 || n < limit {
		return
	}
	_ = http.NewResponseController(w).Flush()
	switch {
	case f.Stall > 0:
		select {
		case <-p.gone:
		case <-r.Context().Done():
		}
	case f.Reset > 0:
		reset(w)
	}
	panic(http.ErrAbortHandler)
}

// upload is the body of a request, as far as the fault lets it.
func upload(r *http.Request, f *Fault) io.ReadCloser {
	if f.Reset == 0 {
		return r.Body
	}
	return &broken{r.Body, f.Reset}
}

// broken is a body that fails after some bytes.
type broken struct {
	io.ReadCloser
	left int64
}

func (b *broken) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("broken by the test")
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// reset ends a connection with RST.
func reset(w http.ResponseWriter) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return // HTTP/2, or the answer is not begun: the handler's panic ends it
	}
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}

// Answer is a Do that answers with a status and a body.
func Answer(status int, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// Nobody is an address of loopback at which nothing listens.
func Nobody(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
