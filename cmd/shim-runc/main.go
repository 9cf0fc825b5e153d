// Command shim-runc keeps one container: it runs it with libcontainer, carries its output, and knows how it ended.
package main

import (
	"os"
	"runtime"

	"github.com/managerd/managerd/cmd/shim-runc/internal/boot"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
)

func init() {
	runtime.MemProfileRate = 0 // see service.Profile
	engine.InitHook()
}

func main() { os.Exit(boot.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }
