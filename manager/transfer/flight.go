package transfer

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/namespaces"
)

// flights are the blobs that are being fetched, each by one client for all who want it.
type flights struct {
	mu  sync.Mutex
	all map[string]*flight
}

// flight is one of them. The client that began it stays until it has ended, also when it has lost interest: its lease
// keeps what is written.
type flight struct {
	ready chan struct{} // closed when there is something to read
	part  content.Partial

	done  chan struct{} // closed at the end
	err   error
	there bool // it was there already

	wanted int // guarded by flights.mu
	stop   context.CancelFunc
}

// join gives the flight of a blob, and whether the caller has to fly it, with the context that is returned.
func (f *flights) join(ctx context.Context, key string) (_ *flight, lead context.Context) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.all[key]; fl != nil {
		fl.wanted++
		return fl, nil
	}
	fl := &flight{ready: make(chan struct{}), done: make(chan struct{}), wanted: 1}
	lead, fl.stop = context.WithCancel(context.WithoutCancel(ctx))
	f.all[key] = fl
	return fl, lead
}

// leave is for one who wants the blob no more; the last one stops the flight.
func (f *flights) leave(fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl.wanted--; fl.wanted == 0 {
		fl.stop()
	}
}

// land ends a flight.
func (f *flights) land(key string, fl *flight, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.all, key)
	fl.err = err
	fl.stop()
	close(fl.done)
}

// wait is for the end of the flight, or of ctx.
func (f *flights) wait(ctx context.Context, fl *flight) error {
	select {
	case <-fl.done:
		f.leave(fl)
		return fl.err
	case <-ctx.Done():
		f.leave(fl)
		return context.Cause(ctx)
	}
}

// flying tells whether it has something to read and has not ended.
func (fl *flight) flying() bool {
	select {
	case <-fl.done:
		return false
	default:
		return fl.part != nil
	}
}

// blob is one that a pull wants.
type blob struct {
	desc   ocispec.Descriptor
	labels map[string]string
	job    *job

	began chan *flight  // the first flight by which it comes
	done  chan struct{} // closed when it is there, or will not come
	err   error
}

func newBlob(desc ocispec.Descriptor, labels map[string]string, j *job) *blob {
	return &blob{desc: desc, labels: labels, job: j, began: make(chan *flight, 1), done: make(chan struct{})}
}

// fetch has a blob in the content store of the context's namespace, kept by its lease, with its labels.
func (s *Service) fetch(ctx context.Context, remote Remote, b *blob) error {
	there, err := s.get(ctx, remote, b)
	switch {
	case err == nil && there:
		b.job.set(eventExists, b.desc.Size)
	case err == nil:
		b.job.set(eventComplete, b.desc.Size)
	}
	b.err = err
	close(b.done)
	return err
}

// get is fetch; it tells whether the blob was there already.
func (s *Service) get(ctx context.Context, remote Remote, b *blob) (there bool, err error) {
	key := b.desc.Digest.String()
	if s.cfg.Isolated {
		ns, err := namespaces.Required(ctx)
		if err != nil {
			return false, err
		}
		key = ns + "/" + key
	}
	for followed := false; ; followed = true {
		fl, lead := s.flights.join(ctx, key)
		if lead != nil {
			go func() { s.flights.land(key, fl, s.fly(lead, remote, b, fl)) }()
		}
		select {
		case b.began <- fl:
		default:
		}
		if lead == nil {
			s.watch(ctx, fl, b.job)
		}
		err := s.flights.wait(ctx, fl)
		switch {
		case lead != nil:
			<-fl.done // others may count on our lease
			if err == nil && fl.there {
				return !followed, s.blobs.SetLabels(ctx, b.desc.Digest, b.labels)
			}
			return false, err
		case ctx.Err() != nil:
			return false, err
		}
		// It is there, and is to be made ours; or somebody else failed, which need not be our fate.
	}
}

// watch has a job follow a flight that somebody else began.
func (s *Service) watch(ctx context.Context, fl *flight, j *job) {
	select {
	case <-fl.ready:
		j.follow(eventDownloading, fl.part.Written)
	case <-fl.done:
	case <-ctx.Done():
	}
}

// busy is how often an ingest that another client of the content store writes is looked at.
const busy = 50 * time.Millisecond

// fly fetches the blob. A disk that is full gets its room back.
func (s *Service) fly(ctx context.Context, remote Remote, b *blob, fl *flight) error {
	ref := archive.RefKey(b.desc)
	part, err := s.cfg.Content.Partial(ctx, ref, b.desc.Digest, b.desc.Size, s.cfg.PartSize)
	for errors.Is(err, content.ErrBusy) {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(busy):
		}
		part, err = s.cfg.Content.Partial(ctx, ref, b.desc.Digest, b.desc.Size, s.cfg.PartSize)
	}
	if errdefs.IsAlreadyExists(err) {
		fl.there = true
		return nil
	}
	if err != nil {
		return err
	}
	fl.part = part
	close(fl.ready)
	b.job.follow(eventDownloading, part.Written)
	err = download(ctx, remote, b.desc, part, s.cfg.Ranges)
	if err == nil {
		err = part.Commit(ctx, b.labels)
	}
	if errdefs.IsAlreadyExists(err) {
		fl.there, err = true, nil
	}
	b.job.set(eventDownloading, part.Written())
	if cerr := part.Close(); err == nil {
		err = cerr
	}
	if full(err) {
		if aerr := s.cfg.Content.Abort(context.WithoutCancel(ctx), ref); !errdefs.IsNotFound(aerr) {
			err = errors.Join(err, aerr)
		}
	}
	return err
}
