package transfer

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/namespaces"
)

const (
	// leaseFor is how long what a daemon that was killed has fetched is kept for the next attempt.
	leaseFor = 24 * time.Hour
	// keepFor is how long that is of an attempt which failed.
	keepFor = time.Hour
)

// hold is a lease that transfers of the same thing share.
type hold struct {
	id     string
	before []string // leases of attempts that failed, or whose daemon was killed: they end with this one
	n      int      // transfers that use it
}

// leased calls fn with a context whose work is kept meanwhile: by the caller's lease, or by one of ours, which ends with the
// transfer. When that fails, and another attempt may not, what it has fetched is kept for a while.
func (s *Service) leased(ctx context.Context, what string, fn func(context.Context) error) error {
	if _, ok := leases.From(ctx); ok {
		return fn(ctx)
	}
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(what))
	name := "transfer-" + hex.EncodeToString(sum[:8]) + "-"
	h, err := s.take(ctx, ns+"/"+name, name)
	if err != nil {
		return err
	}
	err = fn(leases.With(ctx, h.id))
	if full(err) {
		err = errors.Join(err, s.giveUp(context.WithoutCancel(ctx), ns, h.id))
	}
	return errors.Join(err, s.release(context.WithoutCancel(ctx), ns+"/"+name, name, again(err)))
}

// giveUp aborts what a lease keeps of blobs that are not whole, and that nobody fetches any more.
func (s *Service) giveUp(ctx context.Context, ns, id string) error {
	held, err := s.cfg.Leases.ListResources(ctx, id)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range held {
		if r.Type != leases.Ingests {
			continue
		}
		if err := s.cfg.Content.AbortIdle(ctx, content.Ingest{Namespace: ns, Status: content.Status{Ref: r.ID}}); !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *Service) take(ctx context.Context, key, name string) (*hold, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[key]
	if h == nil {
		h = &hold{}
		var err error
		if h.id, err = s.lease(ctx, name, leaseFor); err != nil {
			return nil, err
		}
		if h.before, err = s.leftovers(ctx, name, h.id); err != nil {
			return nil, errors.Join(err, s.end(ctx, h.id))
		}
		s.held[key] = h
	}
	h.n++
	return h, nil
}

func (s *Service) lease(ctx context.Context, name string, expires time.Duration) (string, error) {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	labels := map[string]string{leases.ExpireLabel: time.Now().Add(expires).UTC().Format(time.RFC3339)}
	l, err := s.cfg.Leases.Create(ctx, name+hex.EncodeToString(b[:]), labels)
	return l.ID, err
}

// extracting is how the key of a snapshot begins that a layer is being unpacked into, see package archive.
const extracting = "extract-"

// leftovers gives the leases of earlier attempts. The snapshots that they were unpacking into are of no use to anybody: they
// are let go.
func (s *Service) leftovers(ctx context.Context, name, but string) (ids []string, err error) {
	all, err := s.cfg.Leases.List(ctx, filters.Always)
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		if !strings.HasPrefix(l.ID, name) || l.ID == but {
			continue
		}
		ids = append(ids, l.ID)
		held, err := s.cfg.Leases.ListResources(ctx, l.ID)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, r := range held {
			if strings.HasPrefix(r.Type, leases.Snapshots) && strings.HasPrefix(r.ID, extracting) {
				if err := s.cfg.Leases.DeleteResource(ctx, l.ID, r); err != nil && !errdefs.IsNotFound(err) {
					return nil, err
				}
			}
		}
	}
	return ids, nil
}

// release ends a lease, and those before it, when nobody uses it any more. With keep, one that expires soon has what it had.
func (s *Service) release(ctx context.Context, key, name string, keep bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[key]
	if h.n--; h.n > 0 {
		return nil
	}
	delete(s.held, key)
	old := append(h.before, h.id)
	if keep {
		if err := s.keep(ctx, name, old); err != nil {
			return err
		}
	}
	var errs []error
	for _, id := range old {
		errs = append(errs, s.end(ctx, id))
	}
	return errors.Join(errs...)
}

// keep has a new lease keep all that old ones do.
func (s *Service) keep(ctx context.Context, name string, old []string) error {
	id, err := s.lease(ctx, name, keepFor)
	if err != nil {
		return err
	}
	for _, o := range old {
		held, err := s.cfg.Leases.ListResources(ctx, o)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		for _, r := range held {
			if err := s.cfg.Leases.AddResource(ctx, id, r); err != nil {
				return fmt.Errorf("cannot keep what was fetched: %w", err)
			}
		}
	}
	return nil
}

func (s *Service) end(ctx context.Context, id string) error {
	if err := s.cfg.Leases.Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// again tells whether a transfer that failed so may go well later, without anything being changed here.
func again(err error) bool {
	if full(err) {
		return false
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	return !diff.OfProcessor(err) && (errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err) || errors.Is(err, io.ErrUnexpectedEOF))
}

// full tells whether a disk has no room.
func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
