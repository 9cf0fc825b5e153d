// Package mounts has the records of mounts that clients had the daemon make (manager/mounts), generated from mounts.proto.
package mounts
