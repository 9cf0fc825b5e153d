package command

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/template"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
)

// hookCommand runs as an OCI hook and makes any program one: it puts the container's state, which a runtime passes on
// standard input (runtime-spec, "POSIX-platform Hooks"), into the program's arguments.
func hookCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "oci-hook -- COMMAND [ARG...]",
		Short: "Run a command as an OCI hook, with the container's state in its arguments",
		Long: `Reads a container's state from standard input and replaces this process by COMMAND. In every argument
{{id}}, {{pid}}, {{status}}, {{bundle}}, {{rootfs}}, {{version}} and {{annotation "KEY"}} are replaced.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var state specs.State
			if err := json.NewDecoder(cmd.InOrStdin()).Decode(&state); err != nil {
				return fmt.Errorf("cannot read the container's state from standard input: %w", err)
			}
			argv, err := expand(args, &state)
			if err != nil {
				return err
			}
			path, err := exec.LookPath(argv[0])
			if err != nil {
				return fmt.Errorf("cannot run hook of container %s: %w", state.ID, err)
			}
			return fmt.Errorf("cannot run hook of container %s: %s: %w", state.ID, path, syscall.Exec(path, argv, os.Environ()))
		},
	}
}

// expand fills the state into arguments.
func expand(args []string, state *specs.State) ([]string, error) {
	funcs := template.FuncMap{
		"id":         func() string { return state.ID },
		"pid":        func() string { return strconv.Itoa(state.Pid) },
		"status":     func() string { return string(state.Status) },
		"bundle":     func() string { return state.Bundle },
		"version":    func() string { return state.Version },
		"rootfs":     func() (string, error) { return rootfs(state.Bundle) },
		"annotation": func(key string) string { return state.Annotations[key] },
	}
	var out []string
	for _, arg := range args {
		t, err := template.New("argument").Funcs(funcs).Parse(arg)
		if err != nil {
			return nil, fmt.Errorf("argument %q: %w", arg, err)
		}
		var b strings.Builder
		if err := t.Execute(&b, nil); err != nil {
			return nil, fmt.Errorf("argument %q: %w", arg, err)
		}
		out = append(out, b.String())
	}
	return out, nil
}

// rootfs is the root of the container with this bundle.
func rootfs(bundle string) (string, error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(f)
	if err != nil {
		return "", err
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return "", fmt.Errorf("%s: %w", f.Name(), err)
	}
	if spec.Root == nil {
		return "", fmt.Errorf("%s has no root", f.Name())
	}
	if filepath.IsAbs(spec.Root.Path) {
		return spec.Root.Path, nil
	}
	return filepath.Join(bundle, spec.Root.Path), nil
}
