package command

import (
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/shimapi/version"
)

func (c *cli) root() *cobra.Command {
	root := group("mctl", "The command line of managerd", nil,
		c.versionCommand(), c.runCommand(), c.tasksCommand(), c.imagesCommand())
	root.SilenceErrors, root.SilenceUsage = true, true
	root.Version = version.Version + " " + version.Revision
	root.SetVersionTemplate("mctl github.com/managerd/managerd {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return misused(cmd, "%w", err) })
	root.PersistentPreRunE = c.check
	root.CompletionOptions.HiddenDefaultCmd = true
	p := root.PersistentFlags()
	p.StringVarP(&c.address, "address", "a", env(defaultAddress, "MANAGERD_ADDRESS", "CONTAINERD_ADDRESS"), "`path` of the daemon's socket")
	p.StringVarP(&c.namespace, "namespace", "n", env(namespaces.Default, "MANAGERD_NAMESPACE", "CONTAINERD_NAMESPACE"), "`namespace` to work in")
	p.StringVarP(&c.output, "output", "o", "table", "output `format`: table or json")
	p.DurationVar(&c.timeout, "timeout", 0, "`time` that the command may take (10s, 5m; 0: any)")
	return root
}
