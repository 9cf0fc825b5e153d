package proxy

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/peer"
)

// message is how many bytes are written at a time.
const message = 1 << 20

// session is an ingest that the program has open for us. When the program is started again it is opened anew, and goes on
// at what the program has of it.
type session struct {
	b      *Backend
	ctx    context.Context
	ns     string
	alg    digest.Algorithm
	status content.Status

	stream api.Content_WriteClient
	peer   *peer.Session // nil: it is not open

	sum  hash.Hash // of all that was written; nil when some of it was not written here
	seen string    // the digest as the program says
	over bool      // it is committed: there is no ingest any more
}

// Ingest implements content.Backend. The expected digest is not told before the commit: who asks for it may not be allowed
// to have the blob without writing it.
func (b *Backend) Ingest(ctx context.Context, ns string, want content.Status) (content.Session, error) {
	s := &session{b: b, ctx: ctx, ns: ns, alg: want.Algorithm(), status: want}
	if err := b.again(ctx, s.open); err != nil {
		return nil, err
	}
	if s.status.Offset == 0 {
		s.sum = s.alg.Hash()
	}
	return s, nil
}

// open begins a call, and learns where the ingest stands.
func (s *session) open() error {
	s.shut()
	p, err := s.b.peer.Session(s.ctx)
	if err != nil {
		return err
	}
	s.peer = p
	err = p.Step(s.ctx, s.b.cfg.Quick, func() (err error) {
		s.stream, err = s.b.client.Write(namespaces.With(p.Context(), space))
		return err
	})
	if err == nil {
		_, err = s.ask(s.ctx, s.b.cfg.Quick, &api.WriteContentRequest{
			Action: api.WriteAction_STAT, Ref: reference(s.ns, s.status.Ref), Total: s.status.Total,
		})
	}
	if err != nil {
		s.shut()
	}
	return err
}

func (s *session) shut() {
	if s.peer != nil {
		s.peer.Close()
		s.peer, s.stream = nil, nil
	}
}

// ask sends a message and waits for the answer, which it notes. After an error the call is over.
func (s *session) ask(ctx context.Context, patience time.Duration, r *api.WriteContentRequest) (resp *api.WriteContentResponse, err error) {
	err = s.peer.Step(ctx, patience, func() error {
		if err := s.stream.Send(r); err != nil && !errors.Is(err, io.EOF) { // of that, Recv has the reason
			return err
		}
		resp, err = s.stream.Recv()
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the write ended without an answer: %w", errdefs.ErrUnavailable)
		}
		return err
	})
	if err != nil {
		s.shut()
		return nil, err
	}
	s.status.Offset, s.seen = resp.Offset, resp.Digest
	if resp.Total > 0 {
		s.status.Total = resp.Total
	}
	if t := resp.GetStartedAt(); t.IsValid() && t.GetSeconds() > 0 {
		s.status.StartedAt = t.AsTime()
	}
	if t := resp.GetUpdatedAt(); t.IsValid() && t.GetSeconds() > 0 {
		s.status.UpdatedAt = t.AsTime()
	}
	return resp, nil
}

// Write implements content.Session.
func (s *session) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = s.write(p[n:min(len(p), n+message)])
		n += m
	}
	return n, err
}

// write writes one message. What the program had of it when it was ended is not written twice.
func (s *session) write(p []byte) (int, error) {
	begin := s.status.Offset
	done := 0
	err := s.b.again(s.ctx, func() error {
		if s.peer == nil {
			if err := s.open(); err != nil {
				s.status.Offset = begin + int64(done)
				return err
			}
			at := s.status.Offset
			if at < begin || at > begin+int64(len(p)) {
				s.status.Offset = begin + int64(done)
				s.shut()
				return fmt.Errorf("%s has %d bytes of ingest %q, of which %d were written: %w", s.b.cfg.Name, at, s.status.Ref, begin, errdefs.ErrAborted)
			}
			done = int(at - begin)
		}
		if done == len(p) {
			return nil
		}
		_, err := s.ask(s.ctx, s.b.cfg.Step, &api.WriteContentRequest{Action: api.WriteAction_WRITE, Offset: begin + int64(done), Data: p[done:]})
		if err != nil {
			return err
		}
		at := s.status.Offset
		if at != begin+int64(len(p)) {
			s.shut()
			return fmt.Errorf("%s has %d bytes of ingest %q after a write to %d: %w", s.b.cfg.Name, at, s.status.Ref, begin+int64(len(p)), errdefs.ErrDataLoss)
		}
		done = len(p)
		return nil
	})
	s.status.UpdatedAt = time.Now().UTC()
	if s.sum != nil {
		_, _ = s.sum.Write(p[:done]) // a hash never fails
	}
	return done, err
}

// Reset implements content.Session: the program may have thrown nothing away before the next write, which begins at 0, so
// the ingest is begun anew.
func (s *session) Reset() error {
	s.shut()
	if err := s.b.Abort(s.ctx, s.ns, s.status.Ref); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := s.b.again(s.ctx, s.open); err != nil {
		return err
	}
	if s.status.Offset != 0 {
		return fmt.Errorf("%s has %d bytes of ingest %q after it was aborted: %w", s.b.cfg.Name, s.status.Offset, s.status.Ref, errdefs.ErrDataLoss)
	}
	s.sum = s.alg.Hash()
	return nil
}

// Status implements content.Session.
func (s *session) Status() content.Status { return s.status }

// Digest implements content.Session. Of what was not written here, the program may say it.
func (s *session) Digest() (digest.Digest, error) {
	if s.sum != nil {
		return digest.NewDigest(s.alg, s.sum), nil
	}
	if s.peer != nil {
		if _, err := s.ask(s.ctx, s.b.cfg.Slow, &api.WriteContentRequest{Action: api.WriteAction_STAT}); err != nil {
			return "", err
		}
	}
	if d := digest.Digest(s.seen); d.Validate() == nil && d.Algorithm() == s.alg {
		return d, nil
	}
	return "", nil
}

// Sync implements content.Session: the program does it at the commit.
func (s *session) Sync() error { return nil }

// Commit implements content.Session. When the program ends before it has answered, it is asked whether it has the blob.
func (s *session) Commit(ctx context.Context, d digest.Digest) error {
	size := s.status.Offset
	return s.b.again(ctx, func() error {
		if s.peer == nil {
			got, err := s.b.Stat(ctx, d)
			if err == nil && got == size {
				return s.end(ctx)
			}
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			if err := s.open(); err != nil {
				return err
			}
			if at := s.status.Offset; at != size {
				return fmt.Errorf("%s has %d bytes of ingest %q, of which %d were written: %w", s.b.cfg.Name, at, s.status.Ref, size, errdefs.ErrAborted)
			}
		}
		resp, err := s.ask(ctx, s.b.cfg.Slow, &api.WriteContentRequest{
			Action: api.WriteAction_COMMIT, Offset: size, Total: size, Expected: d.String(), Labels: map[string]string{LabelOwner: s.b.cfg.Owner},
		})
		s.status.Offset = size
		switch {
		case errdefs.IsAlreadyExists(err):
			return s.end(ctx)
		case err != nil:
			return err
		case resp.Digest != "" && resp.Digest != d.String():
			return fmt.Errorf("%s committed %s instead of %s: %w", s.b.cfg.Name, resp.Digest, d, errdefs.ErrDataLoss)
		}
		s.shut()
		s.over = true
		return nil
	})
}

// end gives up the ingest of a blob that is there.
func (s *session) end(ctx context.Context) error {
	_ = s.Discard(ctx) // one that stays is found by its age
	s.over = true
	return nil
}

// Discard implements content.Session.
func (s *session) Discard(ctx context.Context) error {
	s.shut()
	if s.over {
		return nil
	}
	if err := s.b.Abort(ctx, s.ns, s.status.Ref); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// Close implements content.Session.
func (s *session) Close() error {
	s.shut()
	return nil
}
