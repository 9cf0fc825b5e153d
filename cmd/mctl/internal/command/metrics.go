package command

import (
	"context"
	"fmt"
	"strconv"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

type metricRow struct{ name, value string }

func (c *cli) tasksMetrics() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "metrics ID", Aliases: []string{"metric"}, Short: "Print what a task uses: memory, CPU time, processes", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			as := c.format()
			if format != "" {
				f, err := table.ParseFormat(format)
				if err != nil {
					return misused(cmd, "--format: %w", err)
				}
				as = f
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				id := given[0]
				if _, err := (&process{cl: cl, id: id}).get(ctx); err != nil {
					return ofTask(id, err)
				}
				r, err := cl.Tasks.Metrics(ctx, &tasksapi.MetricsRequest{Filters: []string{"id==" + strconv.Quote(id)}})
				if err != nil {
					return err
				}
				if len(r.Metrics) == 0 {
					return fmt.Errorf("there are no metrics of task %s: it runs no more, or its shim does not answer; see `mctl tasks ls`", id)
				}
				m := r.Metrics[0]
				return c.printMetrics(as, m.ID, m.Timestamp.AsTime(), m.Data)
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "the same as --output, as ctr has it")
	_ = cmd.Flags().MarkHidden("format")
	return cmd
}

// printMetrics prints what a task uses, as its shim said it at a time.
func (c *cli) printMetrics(as table.Format, id string, at time.Time, data *anypb.Any) error {
	v, err := typeurl.UnmarshalAny(data)
	if err != nil {
		return fmt.Errorf("cannot read the metrics of task %s, a %s: %w", id, data.GetTypeUrl(), err)
	}
	if as == table.JSON {
		return table.PrintJSON(c.out, v)
	}
	rows, err := metricRows(v)
	if err != nil {
		return fmt.Errorf("task %s: %w", id, err)
	}
	head := []metricRow{{id, at.Format("2006-01-02 15:04:05.999999999 -0700 MST")}}
	if err := metricTable("ID", "TIMESTAMP").Print(c.out, table.Text, head); err != nil {
		return err
	}
	_, _ = fmt.Fprintln(c.out)
	return metricTable("METRIC", "VALUE").Print(c.out, table.Text, rows)
}

func metricTable(name, value string) table.Table[metricRow] {
	return table.Table[metricRow]{Wide: true, Columns: []table.Column[metricRow]{
		{Title: name, Cell: func(r metricRow) string { return r.name }},
		{Title: value, Cell: func(r metricRow) string { return r.value }},
	}}
}

// metricRows are the counters that ctr shows, of cgroup v1 or v2, then OOM kills, pressure (v2) and network.
func metricRows(v any) (rows []metricRow, err error) {
	add := func(name string, value any) { rows = append(rows, metricRow{name, fmt.Sprint(value)}) }
	addNetwork := func(n interface {
		GetName() string
		GetRxBytes() uint64
		GetRxPackets() uint64
		GetTxBytes() uint64
		GetTxPackets() uint64
	}) {
		add("network."+n.GetName()+".rx_bytes", n.GetRxBytes())
		add("network."+n.GetName()+".rx_packets", n.GetRxPackets())
		add("network."+n.GetName()+".tx_bytes", n.GetTxBytes())
		add("network."+n.GetName()+".tx_packets", n.GetTxPackets())
	}
	addPressure := func(of string, p *cgroup2.PSIStats) {
		if s := p.GetSome(); s != nil { // percent of the last ten seconds, and microseconds in all
			add(of+".pressure.some.avg10", s.Avg10)
			add(of+".pressure.some.total", s.Total)
		}
		if f := p.GetFull(); f != nil {
			add(of+".pressure.full.avg10", f.Avg10)
			add(of+".pressure.full.total", f.Total)
		}
	}
	switch m := v.(type) {
	case *cgroup1.Metrics:
		if u := m.Memory.GetUsage(); u != nil {
			add("memory.usage_in_bytes", u.Usage)
			add("memory.limit_in_bytes", u.Limit)
			add("memory.stat.cache", m.Memory.TotalCache)
		}
		if u := m.CPU.GetUsage(); u != nil {
			add("cpuacct.usage", u.Total)
			add("cpuacct.usage_percpu", u.PerCPU)
		}
		if m.Pids != nil {
			add("pids.current", m.Pids.Current)
			add("pids.limit", m.Pids.Limit)
		}
		if o := m.MemoryOomControl; o != nil {
			add("memory.oom_kill", o.OomKill)
		}
		for _, n := range m.Network {
			addNetwork(n)
		}
	case *cgroup2.Metrics:
		if m.Pids != nil {
			add("pids.current", m.Pids.Current)
			add("pids.limit", m.Pids.Limit)
		}
		if m.CPU != nil {
			add("cpu.usage_usec", m.CPU.UsageUsec)
			add("cpu.user_usec", m.CPU.UserUsec)
			add("cpu.system_usec", m.CPU.SystemUsec)
			add("cpu.nr_periods", m.CPU.NrPeriods)
			add("cpu.nr_throttled", m.CPU.NrThrottled)
			add("cpu.throttled_usec", m.CPU.ThrottledUsec)
		}
		if m.Memory != nil {
			add("memory.usage", m.Memory.Usage)
			add("memory.usage_limit", m.Memory.UsageLimit)
			add("memory.swap_usage", m.Memory.SwapUsage)
			add("memory.swap_limit", m.Memory.SwapLimit)
		}
		if e := m.MemoryEvents; e != nil {
			add("memory.oom_kill", e.OomKill)
		}
		addPressure("cpu", m.CPU.GetPSI())
		addPressure("memory", m.Memory.GetPSI())
		addPressure("io", m.Io.GetPSI())
		for _, n := range m.Network {
			addNetwork(n)
		}
	default:
		return nil, fmt.Errorf("metrics of type %T have no table; use -o json", v)
	}
	return rows, nil
}
