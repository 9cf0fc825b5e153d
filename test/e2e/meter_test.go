package e2e

import (
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path"
	"strings"
	"sync"
	"testing"
	"time"
)

// meter stands before a registry, counts the bytes of each blob that it sends, and sends no more than rate a second.
type meter struct {
	addr string
	rate int64 // bytes a second in all; 0 is no limit

	mu     sync.Mutex
	sent   map[string]int64 // by digest
	total  int64
	active int
	free   time.Time     // when the next bytes may be sent
	moved  chan struct{} // closed, and made anew, when bytes are sent or a request ends
}

func newMeter(t *testing.T, backend string, rate int64) *meter {
	t.Helper()
	to, err := url.Parse(backend)
	if err != nil {
		t.Fatal(err)
	}
	m := &meter{rate: rate, sent: map[string]int64{}, moved: make(chan struct{})}
	proxy := httputil.NewSingleHostReverseProxy(to)
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.enter(1)
		defer m.enter(-1)
		if strings.Contains(r.URL.Path, "/blobs/sha256:") && r.Method == http.MethodGet {
			w = &metered{ResponseWriter: w, m: m, blob: path.Base(r.URL.Path)}
		}
		proxy.ServeHTTP(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	// What is sent is on its way, not in a buffer of ours.
	s.Config.ConnState = func(c net.Conn, state http.ConnState) {
		if tcp, ok := c.(*net.TCPConn); ok && state == http.StateNew {
			_ = tcp.SetWriteBuffer(32 << 10)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	m.addr = s.Listener.Addr().String()
	return m
}

func (m *meter) enter(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.active += n
	m.tellLocked()
}

func (m *meter) tellLocked() {
	close(m.moved)
	m.moved = make(chan struct{})
}

// until waits for ok, which is called with the lock held.
func (m *meter) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	for {
		m.mu.Lock()
		done, moved := ok(), m.moved
		m.mu.Unlock()
		if done {
			return
		}
		select {
		case <-moved:
		case <-deadline:
			t.Fatalf("%s does not come about", what)
		}
	}
}

// of gives how many bytes of a blob were sent, or of all.
func (m *meter) of(blob string) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if blob == "" {
		return m.total
	}
	return m.sent[blob]
}

type metered struct {
	http.ResponseWriter
	m    *meter
	blob string
}

func (w *metered) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Write sends in pieces that are small against what the test is about.
func (w *metered) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		piece := p[:min(len(p), 16<<10)]
		w.m.pace(len(piece))
		var k int
		k, err = w.ResponseWriter.Write(piece)
		w.m.mu.Lock()
		w.m.sent[w.blob] += int64(k)
		w.m.total += int64(k)
		w.m.tellLocked()
		w.m.mu.Unlock()
		n, p = n+k, p[k:]
	}
	return n, err
}

// pace waits for the turn of n bytes.
func (m *meter) pace(n int) {
	if m.rate == 0 {
		return
	}
	m.mu.Lock()
	now := time.Now()
	if m.free.Before(now) {
		m.free = now
	}
	at := m.free
	m.free = at.Add(time.Duration(int64(n) * int64(time.Second) / m.rate))
	m.mu.Unlock()
	time.Sleep(time.Until(at))
}
