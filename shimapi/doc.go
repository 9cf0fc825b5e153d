// Package shimapi is the contract between managerd and a shim: the lifecycle of a container's processes as a data
// table, the names inside a bundle that both sides touch, the way a shim is spawned and found, its sockets, and the
// client of its task service. It knows nothing of how either side does its work.
package shimapi
