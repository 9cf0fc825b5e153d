//go:build vmguest

// Package guest holds the tests that run inside the test machine (test/vm): managerd under a real systemd, on cgroup v2.
// They install it, restart, kill, freeze, upgrade and reload it, and boot the machine again; containers must not notice,
// apart from the last. Nothing of it runs outside: make test-vm builds it with the tag vmguest and takes it there.
package guest
