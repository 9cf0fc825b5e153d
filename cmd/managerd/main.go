// Command managerd is the daemon: containerd's API over images, snapshots, and the shims that keep the containers.
package main

import (
	"os"

	"github.com/managerd/managerd/cmd/managerd/internal/command"
)

func main() {
	os.Exit(command.Main(os.Args[1:]))
}
