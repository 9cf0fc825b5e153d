package regproxy

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
)

// Tunnel runs an HTTP proxy until the test ends, and gives its URL. Whatever a client wants to connect to, it is led to
// addr: registries can have any name.
func Tunnel(t testing.TB, addr string) string {
	t.Helper()
	var (
		open  sync.WaitGroup
		mu    sync.Mutex
		conns []net.Conn
	)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.Error(w, "only CONNECT", http.StatusMethodNotAllowed)
			return
		}
		to, err := net.Dial("tcp", addr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		from, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			_ = to.Close()
			return
		}
		mu.Lock()
		conns = append(conns, to, from)
		mu.Unlock()
		_, _ = io.WriteString(from, "HTTP/1.1 200 OK\r\n\r\n")
		for _, way := range []struct {
			to   net.Conn
			from io.Reader
		}{{to, buffered}, {from, to}} {
			open.Go(func() {
				_, _ = io.Copy(way.to, way.from)
				_ = way.to.Close()
			})
		}
	}))
	t.Cleanup(func() {
		s.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		open.Wait()
	})
	return s.URL
}
