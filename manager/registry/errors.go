package registry

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Failure is why one endpoint did not serve.
type Failure struct {
	Endpoint string // URL, without what is asked of it
	Err      error
}

// Error is what became of a request at every endpoint, in the order they were tried. It is of the kind (errdefs) of the
// last, which is the registry itself unless that was skipped: what a mirror does not have, the registry may.
type Error struct {
	Op, Ref  string // what was asked of what, "resolve" of "docker.io/library/busybox:latest"
	Failures []Failure
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
	if len(e.Failures) == 0 {
		return errdefs.ErrNotFound
	}
	return e.Failures[len(e.Failures)-1].Err
}

// StatusError is an answer of HTTP that is not the one hoped for.
type StatusError struct {
	Method, URL string // without its query, which may hold a signature
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
