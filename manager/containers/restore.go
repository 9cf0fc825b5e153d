package containers

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/metadata"
	records "github.com/managerd/managerd/protos/metadata"
)

// specType is how clients name the type of an OCI runtime spec in JSON.
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

// Note gives a container as it is kept beside its task, for a daemon whose database is lost. The spec is not in it: it
// stands there already.
func Note(c Container) ([]byte, error) {
	r := encode(c)
	if r.Spec != nil {
		r.Spec = &records.Any{TypeUrl: r.Spec.TypeUrl}
	}
	return metadata.Seal(&records.ContainerNote{Version: 1, Record: r})
}

// Remains is what a task keeps of its container.
type Remains struct {
	Namespace, ID string
	Note          []byte // what Note gave; nil, or damaged: then the container has but its spec
	Spec          []byte
	Runtime       string // of the task, if there is no note
}

func (m Remains) container() Container {
	var n records.ContainerNote
	if metadata.Unseal(m.Note, &n) == nil && n.Record != nil && n.Record.Spec != nil {
		n.Record.Spec.Value = m.Spec
		return decode(m.ID, n.Record)
	}
	now := time.Now().UTC()
	return Container{
		ID: m.ID, Runtime: Runtime{Name: m.Runtime}, Spec: &anypb.Any{TypeUrl: specType, Value: m.Spec},
		Labels: map[string]string{metadata.RecoveredLabel: now.Format(time.RFC3339)}, CreatedAt: now, UpdatedAt: now,
	}
}

// Restore makes containers again that the database does not know, from what their tasks keep, and says how many it made.
// What cannot be one is in the second answer.
func Restore(db *metadata.DB, all []Remains) (made int, bad []error, err error) {
	err = db.Update(func(tx *metadata.Tx) error {
		for _, m := range all {
			b, err := tx.MakeBucket(metadata.Path(m.Namespace, metadata.Containers)...)
			if err != nil {
				return err
			}
			if _, err := get(b, m.ID); err == nil {
				continue
			} else if !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
				return err
			}
			c := m.container()
			if err := validate(c); err != nil {
				bad = append(bad, fmt.Errorf("container %s of namespace %s cannot be made again: %w", m.ID, m.Namespace, err))
				continue
			}
			if err := metadata.Put(b, c.ID, encode(c)); err != nil {
				return err
			}
			made++
		}
		return nil
	})
	return made, bad, err
}
