// Package e2e tests managerd as its users meet it: the built programs, real containers, Debian's own ctr and gRPC clients.
// It asks what a user would see, kills the daemon whenever it likes, feeds it what nobody should, and looks at the end
// for anything left behind. It must know nothing of how the programs work inside.
package e2e
