package external

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/criu"
	"github.com/managerd/managerd/shimapi"
)

// rewrite makes the terminal, the rlimits and the oom_score_adj in the bundle's config.json those of p, names our configuration
// to criu, should it come to a checkpoint, and changes nothing else there: the program may know fields that we do not.
func rewrite(bundle string, p *specs.Process) error {
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config, process map[string]json.RawMessage
	if err := json.Unmarshal(data, &config); err != nil {
		return err
	}
	if err := json.Unmarshal(config["process"], &process); err != nil {
		return err
	}
	var old specs.Process
	if err := json.Unmarshal(config["process"], &old); err != nil {
		return err
	}
	annotations, err := annotationsOf(config)
	if err != nil {
		return err
	}
	criuConfig := filepath.Join(bundle, shimapi.CriuConfigFile)
	changed := annotations[criu.Annotation] != criuConfig
	for _, field := range []struct {
		name string
		same bool
		now  any
	}{
		{"terminal", old.Terminal == p.Terminal, p.Terminal},
		{"rlimits", slices.Equal(old.Rlimits, p.Rlimits), p.Rlimits},
		{"oomScoreAdj", p.OOMScoreAdj == nil || old.OOMScoreAdj != nil && *old.OOMScoreAdj == *p.OOMScoreAdj, p.OOMScoreAdj},
	} {
		if field.same {
			continue
		}
		changed = true
		if process[field.name], err = json.Marshal(field.now); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	if config["process"], err = json.Marshal(process); err != nil {
		return err
	}
	if config["annotations"], err = json.Marshal(criu.Annotate(annotations, criuConfig)); err != nil {
		return err
	}
	if data, err = json.Marshal(config); err != nil {
		return err
	}
	next := path + ".next"
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
}

func annotationsOf(config map[string]json.RawMessage) (annotations map[string]string, err error) {
	if raw := config["annotations"]; len(raw) > 0 {
		err = json.Unmarshal(raw, &annotations)
	}
	return annotations, err
}

// readAnnotations are those of the bundle's config.json.
func readAnnotations(bundle string) (map[string]string, error) {
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var config map[string]json.RawMessage
	if err := json.Unmarshal(data, &config); err != nil {
		return nil, fmt.Errorf("malformed %s: %w", path, err)
	}
	return annotationsOf(config)
}
