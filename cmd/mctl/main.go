// Command mctl is the command line of managerd: ctr's grammar, and what ctr lacks.
package main

import (
	"os"

	"github.com/managerd/managerd/cmd/mctl/internal/command"
)

func main() {
	os.Exit(command.Main(os.Args[1:]))
}
