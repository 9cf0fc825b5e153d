// Package manager is managerd.v1, what the daemon serves beyond containerd's API, generated from manager.proto.
package manager
