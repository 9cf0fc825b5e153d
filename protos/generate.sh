#!/bin/sh
# Regenerates every *.pb.go below protos/. Needs protoc (Debian: protobuf-compiler) and the module's own
# generator tools (go tool). Wire services use google.golang.org/protobuf with gRPC (the
# daemon's) or ttrpc (the shim's), records use gogofaster.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go \
	github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc \
	google.golang.org/grpc/cmd/protoc-gen-go-grpc \
	github.com/gogo/protobuf/protoc-gen-gogofaster
PATH="$bin:$PATH"
for f in manager/v1/*.proto; do
	protoc -I . --go_out=paths=source_relative:. --go-grpc_out=paths=source_relative:. "$f"
done
for f in shim/v1/*.proto; do
	protoc -I . --go_out=paths=source_relative:. --go-ttrpc_out=paths=source_relative:. "$f"
done
for f in metadata/*.proto ledger/*.proto eventlog/*.proto mounts/*.proto shimstate/*.proto; do
	protoc -I . --gogofaster_out=paths=source_relative:. "$f"
done
