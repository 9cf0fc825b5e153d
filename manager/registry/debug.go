package registry

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"time"
)

// Debug tells what is asked of registries and their token servers, and what they answer. Bodies and secrets are left out;
// queries of URLs are not.
type Debug struct {
	Say         func(text string) // is called by several goroutines at once, each time with whole lines
	Messages    bool              // requests and answers, with their headers
	Connections bool              // look-ups of names, connections, TLS, and when the first byte came
}

// hidden are headers whose values nobody is told.
var hidden = []string{"Authorization", "Cookie", "Set-Cookie"}

func without(secrets http.Header) http.Header {
	h := secrets.Clone()
	for _, name := range hidden {
		if h.Get(name) != "" {
			h.Set(name, "(hidden)")
		}
	}
	return h
}

// roundTrip makes a request by base, and tells of it.
func (d *Debug) roundTrip(base http.RoundTripper, req *http.Request) (*http.Response, error) {
	if d.Messages {
		shown := req.Clone(req.Context())
		shown.Header, shown.Body = without(req.Header), nil
		if text, err := httputil.DumpRequest(shown, false); err == nil {
			d.Say(string(text))
		}
	}
	if d.Connections {
		req = req.WithContext(httptrace.WithClientTrace(req.Context(), d.trace(req)))
	}
	resp, err := base.RoundTrip(req)
	switch {
	case err != nil:
		d.Say(fmt.Sprintf("%s %s: %v\n", req.Method, req.URL.Redacted(), err))
	case d.Messages:
		shown := *resp
		shown.Header, shown.Body = without(resp.Header), http.NoBody
		if text, err := httputil.DumpResponse(&shown, false); err == nil {
			d.Say(string(text))
		}
	}
	return resp, err
}

func (d *Debug) trace(req *http.Request) *httptrace.ClientTrace {
	began, asked := time.Now(), req.Method+" "+req.URL.Redacted()
	say := func(format string, args ...any) {
		d.Say(fmt.Sprintf("%s: %v: %s\n", asked, time.Since(began).Round(time.Microsecond), fmt.Sprintf(format, args...)))
	}
	result := func(err error) string {
		if err != nil {
			return err.Error()
		}
		return "done"
	}
	return &httptrace.ClientTrace{
		DNSDone:          func(i httptrace.DNSDoneInfo) { say("name looked up: %v, %s", i.Addrs, result(i.Err)) },
		ConnectStart:     func(_, addr string) { say("connecting to %s", addr) },
		ConnectDone:      func(_, addr string, err error) { say("connected to %s: %s", addr, result(err)) },
		TLSHandshakeDone: func(s tls.ConnectionState, err error) { say("%s: %s", tls.VersionName(s.Version), result(err)) },
		GotConn: func(i httptrace.GotConnInfo) {
			say("on the connection to %v, reused: %t", i.Conn.RemoteAddr(), i.Reused)
		},
		WroteRequest:         func(i httptrace.WroteRequestInfo) { say("request sent: %s", result(i.Err)) },
		GotFirstResponseByte: func() { say("first byte of the answer") },
	}
}
