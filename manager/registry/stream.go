package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// stream reads part of a blob from whoever has it.
type stream struct {
	p        *Repository
	ctx      context.Context
	desc     ocispec.Descriptor
	pos, end int64
	verifier digest.Verifier // nil where only a part is read
	ranges   bool            // a registry without ranges will not do

	body   io.ReadCloser // nil while there is none
	from   *endpoint     // of body
	used   []*endpoint   // of which bytes have come
	tries  int           // openings since the last byte
	opened int           // openings at all
	err    error         // what ended it
}

// mostOpenings bounds how often a stream is opened anew, for endpoints that send a few bytes each time: so many, and one
// for each MiB.
const mostOpenings = 100

// start opens the first connection.
func (s *stream) start() error {
	if s.pos == s.end && (s.verifier == nil || emptyBlob(s.desc)) {
		return nil
	}
	if s.pos == s.end {
		return fmt.Errorf("%s: a blob of no bytes has another digest: %w", s.p.named(s.desc.Digest), ErrDigest)
	}
	return s.open(s.endpoints())
}

func (s *stream) endpoints() []*endpoint {
	return s.p.healthy(s.desc.Digest, s.p.able(pull))
}

// open tries endpoints in this order.
func (s *stream) open(among []*endpoint) error {
	s.opened++
	return s.p.each(s.ctx, "fetch", s.p.named(s.desc.Digest), among, func(h *host) error {
		body, skip, err := h.open(s.ctx, s.desc, s.pos, s.end)
		if err != nil {
			return err
		}
		if skip > 0 && s.ranges {
			_ = body.Close()
			return ErrNoRanges
		}
		if n, err := io.CopyN(io.Discard, body, skip); err != nil {
			_ = body.Close()
			if ended(s.ctx, err) {
				return err
			}
			return &TruncatedError{Got: n, Want: s.desc.Size, Err: err}
		}
		s.body, s.from = body, h.endpoint
		return nil
	})
}

// Read is of io.Reader.
func (s *stream) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	for s.pos < s.end {
		if s.body == nil {
			if s.err = s.reopen(); s.err != nil {
				return 0, s.err
			}
		}
		n, err := s.body.Read(p[:min(int64(len(p)), s.end-s.pos)])
		if n > 0 {
			s.took(p[:n])
			if s.pos == s.end {
				if s.err = s.verify(); s.err != nil {
					return n, s.err
				}
			}
			return n, nil
		}
		if err == nil {
			continue
		}
		if ended(s.ctx, err) {
			s.err = err
			return 0, err
		}
		s.broke(err)
	}
	s.err = io.EOF
	return 0, io.EOF
}

func (s *stream) took(p []byte) {
	s.pos += int64(len(p))
	s.tries = 0
	if s.verifier != nil {
		_, _ = s.verifier.Write(p)
	}
	if !slices.Contains(s.used, s.from) {
		s.used = append(s.used, s.from)
	}
}

// broke drops a connection of which nothing more comes.
func (s *stream) broke(err error) {
	_ = s.body.Close()
	s.body = nil
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	s.err = &TruncatedError{Got: s.pos, Want: s.desc.Size, Err: err}
	s.p.r.log.Debug("a blob broke off", "ref", s.p.ref.String(), "digest", s.desc.Digest, "endpoint", s.from.String(), "at", s.pos, "of", s.desc.Size, "error", err)
}

// reopen goes on at another connection: of the same endpoint the first time, of any then.
func (s *stream) reopen() error {
	broke := &Error{Op: "fetch", Ref: s.p.named(s.desc.Digest), Failures: []Failure{{s.from.String(), s.err}}, cause: s.err}
	first := broke.Failures[0]
	for {
		s.tries++
		if s.tries > s.p.r.cfg.Attempts || int64(s.opened) > mostOpenings+s.desc.Size>>20 {
			return broke
		}
		if s.tries > 1 {
			s.p.r.breaker.failed(s.from.String(), broke, time.Now())
			select {
			case <-time.After(firstBackoff << (s.tries - 2)):
			case <-s.ctx.Done():
				return context.Cause(s.ctx)
			}
		}
		among := s.endpoints()
		if i := slices.Index(among, s.from); i > 0 && s.tries == 1 {
			among = slices.Insert(slices.Delete(slices.Clone(among), i, i+1), 0, s.from)
		} else if i == 0 && s.tries%2 == 0 && len(among) > 1 {
			among = append(slices.Clone(among[1:]), among[0])
		}
		err := s.open(among)
		if err == nil {
			s.err = nil
			return nil
		}
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		var failed *Error
		if !errors.As(err, &failed) {
			return err
		}
		failed.Failures = slices.Insert(failed.Failures, 0, first)
		if !unreachable(err) {
			return failed
		}
		broke = failed
	}
}

// verify checks a blob that was read whole.
func (s *stream) verify() error {
	if s.verifier == nil || s.verifier.Verified() {
		return nil
	}
	failed := &Error{Op: "fetch", Ref: s.p.named(s.desc.Digest), cause: ErrDigest}
	for _, e := range s.used {
		s.p.distrust(s.desc.Digest, e)
		failed.Failures = append(failed.Failures, Failure{e.String(), fmt.Errorf("it sent other bytes: %w", ErrDigest)})
	}
	return failed
}

// Close is of io.Closer.
func (s *stream) Close() error {
	if s.err == nil {
		s.err = fmt.Errorf("%s is closed: %w", s.desc.Digest, errdefs.ErrFailedPrecondition)
	}
	if s.body == nil {
		return nil
	}
	body := s.body
	s.body = nil
	return body.Close()
}
