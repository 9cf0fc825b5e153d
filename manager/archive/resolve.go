package archive

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// wanted is a platform that somebody asks for.
type wanted struct {
	platforms.MatchComparer
	name string
}

// here wants images for this machine.
func here() wanted { return wanted{platforms.Default(), platforms.DefaultString()} }

// anyOf wants those for any of the platforms, the first ones rather.
func anyOf(list ...ocispec.Platform) wanted {
	return wanted{platforms.Ordered(list...), formatAll(list)}
}

func formatAll(list []ocispec.Platform) string {
	var names []string
	for _, p := range list {
		names = append(names, platforms.FormatAll(p))
	}
	return strings.Join(names, " or ")
}

// lacks is the error for an index without what is wanted. has are the platforms it does have.
func lacks(d digest.Digest, want string, has []string) error {
	slices.Sort(has)
	has = slices.Compact(has)
	const most = 20
	list := strings.Join(has[:min(len(has), most)], ", ")
	switch {
	case len(has) == 0:
		list = "none"
	case len(has) > most:
		list += fmt.Sprintf(" and %d more", len(has)-most)
	}
	return fmt.Errorf("index %s has no image for %s, the platforms it has are: %s: %w", d, want, list, errdefs.ErrNotFound)
}

// resolver finds the manifest of an image that suits a platform best.
type resolver struct {
	*walker
	want wanted
	done map[digest.Digest]read[*node] // by index
}

// resolve finds the manifest that suits the platform best, and that is there.
func (w *walker) resolve(desc ocispec.Descriptor, want wanted) (*node, error) {
	r := &resolver{w, want, map[digest.Digest]read[*node]{}}
	return r.resolve(desc, 0)
}

func (r *resolver) resolve(desc ocispec.Descriptor, depth int) (*node, error) {
	if err := deep(depth); err != nil {
		return nil, err
	}
	n, err := r.node(desc)
	if err != nil || isManifest(desc.MediaType) {
		return n, err
	}
	return once(r.done, desc.Digest, func() (*node, error) { return r.best(n, depth) })
}

func (r *resolver) best(n *node, depth int) (*node, error) {
	var best *node
	var rank ocispec.Platform
	var last error
	var has []string
	for _, m := range n.manifests {
		if attests(m) || !isIndex(m.MediaType) && !isManifest(m.MediaType) {
			continue
		}
		if m.Platform != nil && !r.want.Match(*m.Platform) {
			has = append(has, platforms.FormatAll(*m.Platform))
			continue
		}
		found, err := r.resolve(m, depth+1)
		if errdefs.IsNotFound(err) {
			last = err
			continue
		}
		if err != nil {
			return nil, err
		}
		p := m.Platform
		if p == nil {
			own, err := r.platform(found)
			if err != nil {
				return nil, err
			}
			if !r.want.Match(own) {
				has = append(has, platforms.FormatAll(own))
				continue
			}
			p = &own
		}
		if best == nil || r.want.Less(*p, rank) {
			best, rank = found, *p
		}
	}
	switch {
	case best != nil:
		return best, nil
	case last != nil:
		return nil, last
	}
	return nil, lacks(n.desc.Digest, r.want.name, has)
}
