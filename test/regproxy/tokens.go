package regproxy

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Service and Issuer are what tokens are for, and from.
const (
	Service = "test-registry"
	Issuer  = "test-issuer"
)

// Tokens is a server of bearer tokens (distribution's "Token Authentication"), by GET with a password and by POST with a
// refresh token.
type Tokens struct {
	URL    string
	Bundle string // its certificate, for the registry

	Users   map[string]string // passwords by user; those without one may pull only
	Refresh string            // the refresh token that is taken for user "refreshed"; "" for none

	mu     sync.Mutex
	life   time.Duration // of a token
	served []Served
	key    *ecdsa.PrivateKey
	cert   []byte
}

// Served is a token that was given.
type Served struct {
	Method, User string
	Scopes       []string
}

// StartTokens runs a server until the test ends.
func StartTokens(t testing.TB) *Tokens {
	t.Helper()
	s := &Tokens{Users: map[string]string{}, life: 5 * time.Minute, Bundle: filepath.Join(t.TempDir(), "tokens.crt")}
	var err error
	s.key, s.cert, err = certify(&x509.Certificate{Subject: pkix.Name{CommonName: Issuer}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := writePEM(s.Bundle, "CERTIFICATE", s.cert); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.URL = server.URL
	return s
}

// Life sets how long tokens that are given from now on are good.
func (s *Tokens) Life(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life = d
}

// Served are the tokens that were given so far.
func (s *Tokens) Served() []Served {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Served(nil), s.served...)
}

func (s *Tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	user, password, basic := r.BasicAuth()
	switch {
	case r.Method == http.MethodPost && s.Refresh != "" && r.Form.Get("refresh_token") == s.Refresh:
		user = "refreshed"
	case r.Method == http.MethodPost, basic && (s.Users[user] == "" || s.Users[user] != password):
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"incorrect username or password"}]}`)
		return
	}
	var scopes []string
	for _, v := range r.Form["scope"] {
		scopes = append(scopes, strings.Fields(v)...)
	}
	token, err := s.sign(user, scopes)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.mu.Lock()
	s.served = append(s.served, Served{r.Method, user, scopes})
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token})
}

// sign makes a JSON web token (RFC 7519, ES256) with distribution's access claim.
func (s *Tokens) sign(user string, scopes []string) (string, error) {
	type access struct {
		Type    string   `json:"type"`
		Name    string   `json:"name"`
		Actions []string `json:"actions"`
	}
	granted := []access{}
	for _, scope := range scopes {
		parts := strings.Split(scope, ":")
		if len(parts) != 3 {
			continue
		}
		a := access{parts[0], parts[1], nil}
		for action := range strings.SplitSeq(parts[2], ",") {
			if user != "" || action == "pull" {
				a.Actions = append(a.Actions, action)
			}
		}
		granted = append(granted, a)
	}
	s.mu.Lock()
	life := s.life
	s.mu.Unlock()
	now := time.Now()
	header := map[string]any{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(s.cert)}}
	claims := map[string]any{
		"iss": Issuer, "sub": user, "aud": Service, "jti": rand.Text(), "access": granted,
		"iat": now.Unix(), "nbf": now.Add(-5 * time.Minute).Unix(), "exp": now.Add(life).Unix(),
	}
	var parts []string
	for _, v := range []any{header, claims} {
		data, err := json.Marshal(v)
		if err != nil {
			return "", err
		}
		parts = append(parts, base64.RawURLEncoding.EncodeToString(data))
	}
	signed := strings.Join(parts, ".")
	sum := sha256.Sum256([]byte(signed))
	a, b, err := ecdsa.Sign(rand.Reader, s.key, sum[:])
	if err != nil {
		return "", err
	}
	signature := make([]byte, 64)
	a.FillBytes(signature[:32])
	b.FillBytes(signature[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}
