package command

import (
	"context"
	"fmt"
	"strings"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

type pluginRow struct {
	Type         string            `json:"type"`
	ID           string            `json:"id"`
	Platforms    []string          `json:"platforms,omitempty"`
	Status       string            `json:"status"` // ok, warning, skip or error
	Warning      string            `json:"warning,omitempty"`
	Error        string            `json:"error,omitempty"`
	Requires     []string          `json:"requires,omitempty"`
	Exports      map[string]string `json:"exports,omitempty"`
	Capabilities []string          `json:"capabilities,omitempty"`
}

var pluginTable = table.Table[pluginRow]{Wide: true, Columns: []table.Column[pluginRow]{
	{Title: "TYPE", Cell: func(r pluginRow) string { return r.Type }},
	{Title: "ID", Cell: func(r pluginRow) string { return r.ID }},
	{Title: "PLATFORMS", Cell: func(r pluginRow) string {
		if len(r.Platforms) == 0 {
			return "-"
		}
		return strings.Join(r.Platforms, ",")
	}},
	{Title: "STATUS", Cell: func(r pluginRow) string { return r.Status }},
}}

func (c *cli) pluginsCommand() *cobra.Command {
	return group("plugins", "Show what the daemon is made of", []string{"plugin"}, c.pluginsLs(), c.pluginsInspectRuntime())
}

func (c *cli) pluginsLs() *cobra.Command {
	var quiet, detailed bool
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List plugins, and whether they work",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Introspection.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []pluginRow
				var ids []string
				for _, p := range r.Plugins {
					row := pluginRow{
						Type: p.Type, ID: p.ID, Status: "ok", Requires: p.Requires, Exports: p.Exports, Capabilities: p.Capabilities,
					}
					for _, pl := range p.Platforms {
						name := pl.OS + "/" + pl.Architecture
						if pl.Variant != "" {
							name += "/" + pl.Variant
						}
						row.Platforms = append(row.Platforms, name)
					}
					if w := p.Exports["warning"]; w != "" {
						row.Status, row.Warning = "warning", w
					}
					if p.InitErr != nil {
						row.Status, row.Error = "error", p.InitErr.Message
						if strings.HasSuffix(p.InitErr.Message, "skip plugin") { // the machine cannot; nothing is wrong
							row.Status = "skip"
						}
					}
					rows, ids = append(rows, row), append(ids, p.ID)
				}
				if detailed && c.format() == table.Text && !quiet {
					return c.printPlugins(rows)
				}
				return list(c, quiet, ids, pluginTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	cmd.Flags().BoolVarP(&detailed, "detailed", "d", false, "print all that is known about each")
	return cmd
}

// printPlugins prints each plugin in a paragraph.
func (c *cli) printPlugins(rows []pluginRow) error {
	var b strings.Builder
	for i, r := range rows {
		if i > 0 {
			b.WriteString("\n")
		}
		line := func(title, value string) {
			if value != "" {
				_, _ = fmt.Fprintf(&b, "%-14s %s\n", title, value)
			}
		}
		line("Type:", r.Type)
		line("ID:", r.ID)
		line("Status:", r.Status)
		line("Warning:", r.Warning)
		line("Error:", r.Error)
		line("Requires:", strings.Join(r.Requires, ", "))
		line("Platforms:", strings.Join(r.Platforms, ", "))
		line("Capabilities:", strings.Join(r.Capabilities, ", "))
		line("Exports:", table.Labels(r.Exports, ""))
	}
	_, err := fmt.Fprint(c.out, b.String())
	return err
}
