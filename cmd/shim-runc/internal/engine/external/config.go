package external

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/criu"
	"github.com/managerd/managerd/shimapi"
)

// amend changes two things in the bundle's config.json, and nothing else there: the program may know fields that we do
// not. process.terminal is what the request says, and criu is to read our configuration, should it come to a checkpoint.
func amend(bundle string, terminal bool) error {
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
	annotations, err := annotationsOf(config)
	if err != nil {
		return err
	}
	process["terminal"] = json.RawMessage(strconv.FormatBool(terminal))
	if config["process"], err = json.Marshal(process); err != nil {
		return err
	}
	annotations = criu.Annotate(annotations, filepath.Join(bundle, shimapi.CriuConfigFile))
	if config["annotations"], err = json.Marshal(annotations); err != nil {
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
