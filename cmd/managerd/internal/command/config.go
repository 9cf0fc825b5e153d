package command

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/managerd/managerd/manager/config"
)

func (f *flags) configCommand() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Show or convert the configuration", Args: cobra.NoArgs}
	c.AddCommand(
		&cobra.Command{
			Use: "default", Short: "Print the configuration that holds without a file", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := config.Default().WriteTo(cmd.OutOrStdout())
				return err
			},
		},
		&cobra.Command{
			Use: "dump", Short: "Print the configuration that holds: file, imports and flags", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, warnings, err := f.load()
				if err != nil {
					return err
				}
				for _, w := range warnings {
					_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "managerd: warning: %s\n", w)
				}
				_, err = cfg.WriteTo(cmd.OutOrStdout())
				return err
			},
		},
		&cobra.Command{
			Use: "migrate", Short: "Print the file given with --config in the current version", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				path := f.config
				if path == "" {
					path = defaultConfig
				}
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				out, err := config.Migrate(data, path)
				if err != nil {
					return err
				}
				_, err = cmd.OutOrStdout().Write(out)
				return err
			},
		},
	)
	return c
}
