package content

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

const (
	// maxManifest is the largest blob that is looked into for others, in bytes, as registries limit manifests.
	maxManifest = 4 << 20
	// labelRoot keeps a blob that nothing refers to from being collected.
	labelRoot = "containerd.io/gc.root"
	// labelRef and a name says which other blob one refers to.
	labelRef = "containerd.io/gc.ref.content"
)

// Restore makes the records again that the database has lost or never had, from the blobs that are there: each is read and
// must have its digest; what has not is set aside. A blob that an image of a namespace leads to is entered there; of the
// others nobody knows whose they were: they are entered in every namespace when content is shared, with labels that keep
// them and say so, and stay as they are when it is isolated. Records without a blob go: a client that wants it fetches it.
// It takes as long as reading all of what is not known, and may be called again when it was interrupted.
func (s *Store) Restore(ctx context.Context) error {
	on, err := s.db.Recovering(metadata.PartContent)
	if err != nil || !on {
		return err
	}
	r := newRestoring(s)
	for _, step := range []func(context.Context) error{r.list, func(context.Context) error { return r.look() }, r.verify, r.forget, r.enter} {
		if err := step(ctx); err != nil {
			return fmt.Errorf("cannot make the records of content again: %w", err)
		}
	}
	for _, n := range r.notes {
		slog.Warn("recovery of content", "what", n)
	}
	return s.db.Recovered(metadata.PartContent, r.notes...)
}

type restoring struct {
	s     *Store
	known map[string]map[digest.Digest]bool // by namespace
	blobs map[digest.Digest]int64           // sizes
	notes []string
	made  int
}

func newRestoring(s *Store) *restoring {
	return &restoring{s: s, known: map[string]map[digest.Digest]bool{}}
}

func (r *restoring) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// list finds which blobs there are.
func (r *restoring) list(ctx context.Context) (err error) {
	r.blobs, err = r.s.backend.Blobs(ctx, false)
	return err
}

// look finds which records there are.
func (r *restoring) look() error {
	return r.s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			r.known[ns] = map[digest.Digest]bool{}
			return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(d string, _ *records.Blob) error {
				r.known[ns][digest.Digest(d)] = true
				return nil
			})
		})
	})
}

func (r *restoring) everKnown(d digest.Digest) bool {
	for _, ns := range r.known {
		if ns[d] {
			return true
		}
	}
	return false
}

// verify reads the blobs that no record knows.
func (r *restoring) verify(ctx context.Context) error {
	for _, d := range r.unknown() {
		ok, err := r.verified(ctx, d)
		if errdefs.IsNotFound(err) {
			delete(r.blobs, d)
			continue
		}
		if err != nil {
			return err
		}
		if ok {
			continue
		}
		delete(r.blobs, d)
		f, ours := r.s.backend.(*files)
		if !ours {
			r.note("a blob is not what its digest %s says; it was left where it is", d)
			continue
		}
		aside, err := f.setAside(d)
		if err != nil {
			return err
		}
		r.note("a blob is not what its digest %s says; it was set aside as %s", d, aside)
	}
	return nil
}

func (r *restoring) unknown() (out []digest.Digest) {
	for d := range r.blobs {
		if !r.everKnown(d) {
			out = append(out, d)
		}
	}
	slices.Sort(out)
	return out
}

func (r *restoring) verified(ctx context.Context, d digest.Digest) (bool, error) {
	blob, err := r.s.backend.Open(ctx, d, r.blobs[d])
	if err != nil {
		return false, err
	}
	defer func() { _ = blob.Close() }()
	in, v := io.NewSectionReader(blob, 0, blob.Size()), d.Verifier()
	for {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		if _, err := io.CopyN(v, in, 4<<20); errors.Is(err, io.EOF) {
			return v.Verified(), nil
		} else if err != nil {
			return false, fmt.Errorf("cannot read content %s: %w", d, err)
		}
	}
}

// forget removes the records of blobs that are not there.
func (r *restoring) forget(ctx context.Context) error {
	r.s.bytes.Lock()
	defer r.s.bytes.Unlock()
	sizes := maps.Clone(r.blobs)
	for _, blobs := range r.known {
		for d := range blobs {
			if _, listed := sizes[d]; listed || d.Validate() != nil {
				continue
			}
			switch size, err := r.s.backend.Stat(ctx, d); {
			case err == nil: // stored meanwhile
				sizes[d] = size
			case !errdefs.IsNotFound(err):
				return err
			}
		}
	}
	gone := 0
	err := r.s.db.Update(func(tx *metadata.Tx) error {
		for ns, blobs := range r.known {
			b := tx.Bucket(metadata.Path(ns, metadata.Content)...)
			for d := range blobs {
				if d.Validate() != nil {
					continue
				}
				i, err := info(tx, ns, d)
				if err != nil {
					continue // gone meanwhile
				}
				if size, there := sizes[d]; there && size == i.Size {
					continue
				}
				if err := b.Delete([]byte(d)); err != nil {
					return err
				}
				delete(blobs, d)
				gone++
			}
		}
		return nil
	})
	if gone > 0 {
		r.note("%d records of content had no blob, or one of another size, and are gone; pull their images again", gone)
	}
	return err
}

// enter makes the records.
func (r *restoring) enter(ctx context.Context) error {
	var targets []struct {
		ns string
		d  digest.Digest
	}
	err := r.s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Images)...), func(_ string, i *records.Image) error {
				if i.Target != nil {
					targets = append(targets, struct {
						ns string
						d  digest.Digest
					}{ns, digest.Digest(i.Target.Digest)})
				}
				return nil
			})
		})
	})
	if err != nil {
		return err
	}
	for _, t := range targets {
		if err := r.reach(ctx, t.ns, t.d, nil); err != nil {
			return err
		}
	}
	if r.made > 0 {
		r.note("%d blobs that images lead to were entered again", r.made)
	}
	rest := r.unknown()
	if len(rest) == 0 {
		return nil
	}
	if r.s.policy != Shared {
		r.note("%d blobs belong to nobody that is known; content is not shared between namespaces, so they were entered nowhere and are kept", len(rest))
		return nil
	}
	spaces := make([]string, 0, len(r.known))
	for ns := range r.known {
		spaces = append(spaces, ns)
	}
	if len(spaces) == 0 {
		spaces = append(spaces, "default")
	}
	now := time.Now().UTC().Format(time.RFC3339)
	for _, d := range rest {
		labels := map[string]string{metadata.RecoveredLabel: now, labelRoot: now}
		for _, ns := range spaces {
			if err := r.record(ctx, ns, d, labels); err != nil {
				return err
			}
		}
	}
	r.note("%d blobs belong to no image that is known; they were entered in every namespace, with the label %s", len(rest), metadata.RecoveredLabel)
	return nil
}

func (r *restoring) record(ctx context.Context, ns string, d digest.Digest, labels map[string]string) error {
	r.s.bytes.RLock()
	defer r.s.bytes.RUnlock()
	size, err := r.s.backend.Stat(ctx, d)
	if errdefs.IsNotFound(err) {
		return nil // removed meanwhile: there is nothing to be entered
	}
	if err != nil {
		return err
	}
	if err := r.s.record(namespaces.With(ctx, ns), ns, d, size, labels, ""); err != nil {
		return err
	}
	if r.known[ns] == nil {
		r.known[ns] = map[digest.Digest]bool{}
	}
	r.known[ns][d] = true
	r.made++
	return nil
}

// reach enters d, and what it leads to, in a namespace. above are the blobs that lead to it.
func (r *restoring) reach(ctx context.Context, ns string, d digest.Digest, above []digest.Digest) error {
	size, ok := r.blobs[d]
	if !ok || slices.Contains(above, d) || len(above) > 8 {
		return nil
	}
	below := r.references(ctx, d, size)
	if !r.known[ns][d] {
		labels := map[string]string{}
		for i, b := range below {
			labels[fmt.Sprintf("%s.%d", labelRef, i)] = b.String()
		}
		if err := r.record(ctx, ns, d, labels); err != nil {
			return err
		}
	}
	for _, b := range below {
		if err := r.reach(ctx, ns, b, append(above, d)); err != nil {
			return err
		}
	}
	return nil
}

// references gives what a manifest or an index names, in OCI's or Docker's form; none of anything else.
func (r *restoring) references(ctx context.Context, d digest.Digest, size int64) (out []digest.Digest) {
	if size > maxManifest {
		return nil
	}
	blob, err := r.s.backend.Open(ctx, d, size)
	if err != nil {
		return nil
	}
	defer func() { _ = blob.Close() }()
	data, err := io.ReadAll(io.NewSectionReader(blob, 0, size))
	if err != nil {
		return nil
	}
	var m struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    ocispec.Descriptor   `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
	}
	if json.Unmarshal(data, &m) != nil {
		return nil
	}
	for _, desc := range append(append(m.Manifests, m.Config), m.Layers...) {
		if desc.Digest.Validate() == nil {
			out = append(out, desc.Digest)
		}
	}
	return out
}
