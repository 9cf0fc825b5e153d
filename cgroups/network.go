package cgroups

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"google.golang.org/protobuf/proto"
)

// AddNetwork puts what the interfaces of process pid's network namespace have counted into what Stats gave: bytes and packets,
// since the interface was made. Nothing is put there for a process in our own namespace: what that has counted is not the
// container's.
func AddNetwork(m proto.Message, pid int) error {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil || theirs == own {
		return err
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return err
	}
	for _, i := range interfaces(data) {
		switch m := m.(type) {
		case *cgroup1.Metrics:
			m.Network = append(m.Network, &cgroup1.NetworkStat{
				Name: i.name, RxBytes: i.n[0], RxPackets: i.n[1], RxErrors: i.n[2], RxDropped: i.n[3],
				TxBytes: i.n[8], TxPackets: i.n[9], TxErrors: i.n[10], TxDropped: i.n[11],
			})
		case *cgroup2.Metrics:
			m.Network = append(m.Network, &cgroup2.NetworkStat{
				Name: i.name, RxBytes: i.n[0], RxPackets: i.n[1], RxErrors: i.n[2], RxDropped: i.n[3],
				TxBytes: i.n[8], TxPackets: i.n[9], TxErrors: i.n[10], TxDropped: i.n[11],
			})
		}
	}
	return nil
}

// counted is a line of /proc/net/dev (proc(5)): receive bytes, packets, errs, drop, fifo, frame, compressed, multicast, then
// transmit bytes, packets, errs, drop, fifo, colls, carrier, compressed.
type counted struct {
	name string
	n    [16]uint64
}

func interfaces(data []byte) (out []counted) {
	for line := range bytes.Lines(data) {
		name, rest, found := bytes.Cut(line, []byte(":"))
		fields := bytes.Fields(rest)
		if !found || len(fields) < 16 { // the head
			continue
		}
		i := counted{name: string(bytes.TrimSpace(name))}
		for f := range i.n {
			n, err := strconv.ParseUint(string(fields[f]), 10, 64)
			if err != nil {
				return out
			}
			i.n[f] = n
		}
		out = append(out, i)
	}
	return out
}
