package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

// Failure is why one endpoint did not serve.
type Failure struct {
	Endpoint string // URL, without what is asked of it
	Err      error
}

// Error is what became of a request at every endpoint, in the order they were tried. It is of the kind (errdefs) of the
// last, which is the registry itself as a rule: what a mirror does not have, the registry may.
type Error struct {
	Op, Ref  string // what was asked of what, "resolve" of "docker.io/library/busybox:latest"
	Failures []Failure
	cause    error // the failure that decides
}

func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "cannot %s %s: ", e.Op, e.Ref)
	for i, f := range e.Failures {
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "%s: %v", f.Endpoint, f.Err)
	}
	return b.String()
}

// Unwrap is the failure that decides.
func (e *Error) Unwrap() error {
	return e.cause
}

// StatusError is an answer of HTTP that is not the one hoped for.
type StatusError struct {
	Method, URL string // the path at the endpoint, or where it redirected to; without the query, which may hold a signature
	Status      int
	Codes       []string // of the registry's own error, "MANIFEST_UNKNOWN"
	Message     string
	RetryAfter  time.Duration // what the registry asks for, 0 for nothing
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("%s %s: %d %s", e.Method, e.URL, e.Status, http.StatusText(e.Status))
	if e.Message != "" {
		s += ": " + e.Message
	}
	if e.RetryAfter > 0 {
		s += fmt.Sprintf(" (try again in %s)", e.RetryAfter.Round(time.Second))
	}
	return s
}

// Unwrap is the kind of the status.
func (e *StatusError) Unwrap() error { return kindOf(e.Status) }

func kindOf(status int) error {
	switch status {
	case http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	case http.StatusRequestedRangeNotSatisfiable:
		return errdefs.ErrOutOfRange
	case http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return errdefs.ErrNotImplemented
	case http.StatusRequestTimeout:
		return errdefs.ErrUnavailable
	}
	if status >= 500 {
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrFailedPrecondition
}

// StallError is a connection on which nothing came for a time. It is an errdefs.ErrUnavailable.
type StallError struct{ For time.Duration }

func (e *StallError) Error() string { return fmt.Sprintf("no byte came for %s", e.For) }

// Unwrap is its kind.
func (e *StallError) Unwrap() error { return errdefs.ErrUnavailable }

// Timeout makes it a net.Error's.
func (e *StallError) Timeout() bool { return true }

// TruncatedError is an answer that ended, or broke, before its time. It is an errdefs.ErrUnavailable.
type TruncatedError struct {
	Got, Want int64 // bytes, from the beginning of the blob
	Err       error
}

func (e *TruncatedError) Error() string {
	return fmt.Sprintf("broke off after %d of %d bytes: %v", e.Got, e.Want, e.Err)
}

// Unwrap is what broke it, and its kind.
func (e *TruncatedError) Unwrap() []error { return []error{e.Err, errdefs.ErrUnavailable} }

// ErrNoRanges says that an endpoint sends whole blobs only. It is an errdefs.ErrNotImplemented.
var ErrNoRanges = fmt.Errorf("the registry ignores ranges: %w", errdefs.ErrNotImplemented)

// ErrDigest says that content is not what its digest says. It is an errdefs.ErrFailedPrecondition.
var ErrDigest = fmt.Errorf("wrong digest: %w", errdefs.ErrFailedPrecondition)

// ErrNotRegistry says that something else than a registry answered: a portal that wants a login, a proxy's error page.
// It is an errdefs.ErrUnavailable.
var ErrNotRegistry = fmt.Errorf("the answer is a web page, not a registry's: a login page or proxy stands between: %w", errdefs.ErrUnavailable)

// noHostError is a name that DNS does not have, which asking again does not change.
type noHostError string

func (e noHostError) Error() string { return fmt.Sprintf("there is no host %s", string(e)) }

// Unwrap is its kind.
func (e noHostError) Unwrap() error { return errdefs.ErrUnavailable }

// unreachable says whether an error is one of the way to an endpoint, or of its health: the same request may serve later.
func unreachable(err error) bool {
	return errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err) || errors.Is(err, context.DeadlineExceeded)
}

// explain gives an error of the HTTP client its kind and, where it helps, what to do.
func explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		var stall *StallError
		if errors.As(cause, &stall) {
			return cause
		}
		if ctx.Err() != nil {
			return cause
		}
	}
	var asked *url.Error
	if errors.As(err, &asked) { // whatever a redirect signed stays out of messages
		if u, err := url.Parse(asked.URL); err == nil {
			asked.URL = bare(u)
		}
	}
	var (
		authority x509.UnknownAuthorityError
		name      x509.HostnameError
		invalid   x509.CertificateInvalidError
		verify    *tls.CertificateVerificationError
		remote    *net.OpError
		response  *errcode.ErrorResponse
		dns       *net.DNSError
	)
	switch {
	case kinded(err):
		return err
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		return fmt.Errorf("it asks for a user and password, and there are none for it: %w", errdefs.ErrUnauthenticated)
	case errors.As(err, &response):
		return &StatusError{Method: response.Method, URL: bare(response.URL), Status: response.StatusCode, Codes: codes(response.Errors), Message: message(response.Errors)}
	case errors.As(err, &authority):
		return fmt.Errorf("%w (its certificate authority can be named with ca in hosts.toml): %w", err, errdefs.ErrFailedPrecondition)
	case errors.As(err, &name), errors.As(err, &invalid), errors.As(err, &verify):
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	case errors.As(err, &remote) && remote.Op == "remote error" && strings.Contains(remote.Err.Error(), "certificate"): // an alert of TLS
		return fmt.Errorf("%w (does it want a client certificate?): %w", err, errdefs.ErrUnauthenticated)
	case errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%w (it can be asked with plain HTTP: --plain-http, or http:// in hosts.toml): %w", err, errdefs.ErrFailedPrecondition)
	case errors.As(err, &dns) && dns.IsNotFound:
		return noHostError(dns.Name)
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}

// kinded is an error whose kind is known.
func kinded(err error) bool {
	return errdefs.IsUnavailable(err) || errdefs.IsFailedPrecondition(err) || errdefs.IsInvalidArgument(err) || errdefs.IsNotFound(err) ||
		errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err) || errdefs.IsResourceExhausted(err) || errdefs.IsNotImplemented(err)
}

// registryErrors are those of a body of the distribution spec's form, "Error Codes".
func registryErrors(body []byte) errcode.Errors {
	var parsed struct {
		Errors errcode.Errors `json:"errors"`
	}
	if json.Unmarshal(body, &parsed) != nil {
		return nil
	}
	return parsed.Errors
}

func codes(errs errcode.Errors) []string {
	var out []string
	for _, e := range errs {
		out = append(out, e.Code)
	}
	return out
}

func message(errs errcode.Errors) string {
	var out []string
	for _, e := range errs {
		e.Detail = nil
		out = append(out, firstLine([]byte(e.Error())))
	}
	return strings.Join(out, ", ")
}
