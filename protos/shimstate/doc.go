// Package shimstate has the records of a shim's process table and of the descriptors that it parks with the daemon
// (shimstate.proto), so that another shim process can go on where one was killed or replaced.
package shimstate
