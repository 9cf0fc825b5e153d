package command

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

type namespaceRow struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels,omitempty"`
}

var namespaceTable = table.Table[namespaceRow]{Columns: []table.Column[namespaceRow]{
	{Title: "NAME", Cell: func(r namespaceRow) string { return r.Name }},
	{Title: "LABELS", Cell: func(r namespaceRow) string { return table.Labels(r.Labels, "") }},
}}

func (c *cli) namespacesCommand() *cobra.Command {
	return group("namespaces", "Manage namespaces", []string{"namespace", "ns"},
		c.namespacesCreate(), c.namespacesLs(), c.namespacesRm(), c.namespacesLabel())
}

// ofNamespace says what to do about an error about a namespace.
func ofNamespace(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w; `mctl namespaces ls` lists those there are", err)
	}
	return err
}

func (c *cli) namespacesCreate() *cobra.Command {
	return &cobra.Command{
		Use: "create NAME [KEY=VALUE...]", Aliases: []string{"c"}, Short: "Make a namespace", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			labels, _, err := labelArgs(given[1:])
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				_, err := cl.Namespaces.Create(ctx, &api.CreateNamespaceRequest{Namespace: &api.Namespace{Name: given[0], Labels: labels}})
				return err
			})
		},
	}
}

func (c *cli) namespacesLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List namespaces", Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Namespaces.List(ctx, &api.ListNamespacesRequest{})
				if err != nil {
					return err
				}
				var rows []namespaceRow
				var names []string
				for _, n := range r.Namespaces {
					rows, names = append(rows, namespaceRow{n.Name, n.Labels}), append(names, n.Name)
				}
				return list(c, quiet, names, namespaceTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

func (c *cli) namespacesRm() *cobra.Command {
	var cgroup bool
	cmd := &cobra.Command{
		Use: "rm NAME...", Aliases: []string{"remove", "delete", "del"}, Short: "Remove namespaces, which must be empty", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(names, func(name string) error {
					if _, err := cl.Namespaces.Delete(ctx, &api.DeleteNamespaceRequest{Name: name}); err != nil {
						return ofNamespace(err)
					}
					if cgroup {
						if err := cgroups.Remove(name); err != nil {
							return fmt.Errorf("namespace %s is removed, its cgroup is not: %w", name, err)
						}
					}
					if c.format() == table.JSON {
						return nil
					}
					_, err := fmt.Fprintln(c.out, name)
					return err
				})
			})
		},
	}
	cmd.Flags().BoolVarP(&cgroup, "cgroup", "c", false, "remove the cgroup of that name, too, in which its containers were")
	return cmd
}

func (c *cli) namespacesLabel() *cobra.Command {
	return &cobra.Command{
		Use: "label NAME [KEY=VALUE...]", Short: "Set labels of a namespace, or clear those given as KEY=, and print all", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			labels, paths, err := labelArgs(given[1:])
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				if len(paths) == 0 {
					r, err := cl.Namespaces.Get(ctx, &api.GetNamespaceRequest{Name: given[0]})
					if err != nil {
						return ofNamespace(err)
					}
					return c.printLabels(r.Namespace.Labels)
				}
				r, err := cl.Namespaces.Update(ctx, &api.UpdateNamespaceRequest{
					Namespace: &api.Namespace{Name: given[0], Labels: labels}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
				})
				if err != nil {
					return ofNamespace(err)
				}
				return c.printLabels(r.Namespace.Labels)
			})
		},
	}
}
