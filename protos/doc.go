// Package protos is the home of the protocol buffers that managerd defines itself: the shim's own service
// (protos/shim/v1, google.golang.org/protobuf and ttrpc), the daemon's beyond containerd's API (protos/manager/v1, gRPC)
// and the records kept on disk (protos/metadata, protos/eventlog, protos/ledger and protos/shimstate, plain structs by
// gogo/protobuf). Everything that containerd publishes is taken from
// github.com/containerd/containerd/api and never redefined here.
package protos

//go:generate ./generate.sh
