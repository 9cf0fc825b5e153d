// Package chaos kills what may be killed, for as long as it is told to: the daemon, shims, both; it stops shims and replaces
// their code, while containers write, start, exec and end. At the end every exit status must be right, every line there
// once, and nothing left. A run is repeated with its seed.
//
//	make test-chaos DURATION=30m SEED=1
package chaos
