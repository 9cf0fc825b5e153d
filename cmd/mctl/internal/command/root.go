package command

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/shimapi/version"
)

const about = `mctl is the command line of managerd. It speaks containerd's API and ctr's grammar: what works with ctr works here, and a few things
more do. No container depends on it: it may be killed at any moment, and so may managerd while it waits.`

const examples = `  mctl images import busybox.tar                     images come from archives (docker save, OCI layout)
  mctl run --rm -t docker.io/library/busybox:latest try sh
                                                     a shell in a container; ctrl-p ctrl-q leaves it running
  mctl run -d --log-uri file:///tmp/web.log IMAGE web
  mctl tasks exec web ps                             a command in it
  mctl tasks stop web                                TERM, ten seconds of grace, KILL
  mctl tasks rm web && mctl containers rm web
  mctl tasks ls -o json                              everything that prints a table prints JSON`

const statuses = `
Exit status:
  run, exec, attach, start and wait exit with the status of the process; fsck with 1 when it has found something. Else 0 is success, 1 an error of mctl or of the daemon,
  2 a command line that makes no sense, and 128+N the end by signal N.

Environment:
  MANAGERD_ADDRESS, MANAGERD_NAMESPACE (or CONTAINERD_ADDRESS, CONTAINERD_NAMESPACE) stand for --address and --namespace,
  CONTAINERD_SNAPSHOTTER for --snapshotter, MANAGERD_STATE for the --state of shim, logs and fsck.
`

func (c *cli) root() *cobra.Command {
	root := group("mctl", "The command line of managerd", nil)
	root.Long, root.Example = about, examples
	for _, g := range []struct {
		id, title string
		commands  []*cobra.Command
	}{
		{"run", "Run containers:", []*cobra.Command{c.runCommand(), c.containersCommand(), c.tasksCommand(), c.sandboxesCommand(), c.logsCommand()}},
		{"store", "Images and storage:", []*cobra.Command{c.imagesCommand(), c.snapshotsCommand(), c.mountsCommand(), c.contentCommand(), c.leasesCommand()}},
		{"daemon", "The daemon:", []*cobra.Command{c.namespacesCommand(), c.eventsCommand(), c.pluginsCommand(), c.shimCommand(), c.fsckCommand(), c.versionCommand()}},
	} {
		root.AddGroup(&cobra.Group{ID: g.id, Title: g.title})
		for _, cmd := range g.commands {
			cmd.GroupID = g.id
			root.AddCommand(cmd)
		}
	}
	root.SetHelpTemplate(root.HelpTemplate() + "{{if not .HasParent}}" + statuses + "{{end}}")
	root.SetHelpCommandGroupID("daemon")
	cobra.EnableCommandSorting = false // they stand in the order in which people meet them
	root.TraverseChildren = true       // flags before a command are ours, and a command may have its own of the same letter
	root.SilenceErrors, root.SilenceUsage = true, true
	root.Version = version.Version + " " + version.Revision
	root.SetVersionTemplate("mctl github.com/managerd/managerd {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if r := (*refusal)(nil); errors.As(err, &r) {
			err = r
		}
		return misused(cmd, "%w", err)
	})
	root.PersistentPreRunE = c.check
	root.CompletionOptions.HiddenDefaultCmd = true
	p := root.PersistentFlags()
	p.StringVarP(&c.address, "address", "a", fromEnv(), "`path` of the daemon's socket")
	p.StringVarP(&c.namespace, "namespace", "n", env(namespaces.Default, "MANAGERD_NAMESPACE", "CONTAINERD_NAMESPACE"), "`namespace` to work in")
	p.StringVarP(&c.output, "output", "o", "table", "output `format`: table or json")
	p.DurationVar(&c.timeout, "timeout", 0, "`time` that the command may take (10s, 5m; 0: any)")
	p.DurationVar(&c.connectTimeout, "connect-timeout", 0, "`time` to wait for the daemon to serve (0: do not wait)")
	addForCtr(p, "debug", "changes nothing: what mctl does is in its errors, and what the daemon does in its log", &ctrFlag{})
	return root
}

func fromEnv() string { return env(defaultAddress, "MANAGERD_ADDRESS", "CONTAINERD_ADDRESS") }
