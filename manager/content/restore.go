package content

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

const (
	// damagedDir holds blobs that are not what their digest says. They are never removed by us.
	damagedDir = "damaged"
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
	r := &restoring{s: s, known: map[string]map[digest.Digest]bool{}, files: map[digest.Digest]int64{}}
	for _, step := range []func(context.Context) error{r.look, r.verify, r.forget, r.enter} {
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
	files map[digest.Digest]int64           // sizes
	notes []string
	made  int
}

func (r *restoring) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// look finds which records and which files there are.
func (r *restoring) look(context.Context) error {
	err := r.s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			r.known[ns] = map[digest.Digest]bool{}
			return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(d string, _ *records.Blob) error {
				r.known[ns][digest.Digest(d)] = true
				return nil
			})
		})
	})
	if err != nil {
		return err
	}
	algorithms, err := os.ReadDir(r.s.blobs())
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		files, err := os.ReadDir(filepath.Join(r.s.blobs(), a.Name()))
		if err != nil {
			return err
		}
		for _, f := range files {
			d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), f.Name())
			if fi, err := f.Info(); err == nil && d.Validate() == nil && fi.Mode().IsRegular() {
				r.files[d] = fi.Size()
			}
		}
	}
	return nil
}

func (r *restoring) everKnown(d digest.Digest) bool {
	for _, ns := range r.known {
		if ns[d] {
			return true
		}
	}
	return false
}

// verify reads the files that no record knows.
func (r *restoring) verify(ctx context.Context) error {
	for _, d := range r.unknown() {
		ok, err := verified(ctx, r.s.path(d), d)
		if errors.Is(err, fs.ErrNotExist) {
			delete(r.files, d)
			continue
		}
		if err != nil {
			return err
		}
		if ok {
			continue
		}
		aside := filepath.Join(r.s.root, damagedDir, d.Algorithm().String()+"-"+d.Encoded())
		if err := os.MkdirAll(filepath.Dir(aside), 0o700); err != nil {
			return err
		}
		if err := os.Rename(r.s.path(d), aside); err != nil {
			return err
		}
		delete(r.files, d)
		r.note("a blob is not what its digest %s says; it was set aside as %s", d, aside)
	}
	return nil
}

func (r *restoring) unknown() (out []digest.Digest) {
	for d := range r.files {
		if !r.everKnown(d) {
			out = append(out, d)
		}
	}
	slices.Sort(out)
	return out
}

func verified(ctx context.Context, path string, d digest.Digest) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	v := d.Verifier()
	for {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		if _, err := io.CopyN(v, f, 4<<20); errors.Is(err, io.EOF) {
			return v.Verified(), nil
		} else if err != nil {
			return false, fmt.Errorf("cannot read %s: %w", path, err)
		}
	}
}

// forget removes the records of blobs that are not there.
func (r *restoring) forget(context.Context) error {
	r.s.files.Lock()
	defer r.s.files.Unlock()
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
				if fi, err := os.Stat(r.s.path(d)); err == nil && fi.Size() == i.Size || err != nil && !errors.Is(err, fs.ErrNotExist) {
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
func (r *restoring) enter(context.Context) error {
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
		if err := r.reach(t.ns, t.d, nil); err != nil {
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
			if err := r.record(ns, d, labels); err != nil {
				return err
			}
		}
	}
	r.note("%d blobs belong to no image that is known; they were entered in every namespace, with the label %s", len(rest), metadata.RecoveredLabel)
	return nil
}

func (r *restoring) record(ns string, d digest.Digest, labels map[string]string) error {
	r.s.files.RLock()
	defer r.s.files.RUnlock()
	fi, err := os.Stat(r.s.path(d))
	if err != nil {
		return nil //nolint:nilerr // removed meanwhile: there is nothing to be entered
	}
	if err := r.s.record(namespaces.With(context.Background(), ns), ns, d, fi.Size(), labels, ""); err != nil {
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
func (r *restoring) reach(ns string, d digest.Digest, above []digest.Digest) error {
	size, ok := r.files[d]
	if !ok || slices.Contains(above, d) || len(above) > 8 {
		return nil
	}
	below := r.references(d, size)
	if !r.known[ns][d] {
		labels := map[string]string{}
		for i, b := range below {
			labels[fmt.Sprintf("%s.%d", labelRef, i)] = b.String()
		}
		if err := r.record(ns, d, labels); err != nil {
			return err
		}
	}
	for _, b := range below {
		if err := r.reach(ns, b, append(above, d)); err != nil {
			return err
		}
	}
	return nil
}

// references gives what a manifest or an index names, in OCI's or Docker's form; none of anything else.
func (r *restoring) references(d digest.Digest, size int64) (out []digest.Digest) {
	if size > maxManifest {
		return nil
	}
	data, err := os.ReadFile(r.s.path(d))
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
