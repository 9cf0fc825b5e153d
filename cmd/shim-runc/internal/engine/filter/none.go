//go:build !cgo || !seccomp

// Package filter keeps compiled seccomp filters. This build has none: it cannot compile any.
package filter

import (
	"os"

	"github.com/opencontainers/runc/libcontainer/configs"

	"github.com/managerd/managerd/reaper"
)

// Verb is the argument with which this program is to go to Main.
const Verb = "compile-seccomp"

// Cache has nothing and keeps nothing.
type Cache struct {
	Dir    string
	Reaper *reaper.Reaper
}

// Profile is a seccomp profile.
type Profile struct{}

// Take does nothing.
func Take() {}

// Main fails.
func Main() { os.Exit(1) }

// NewProfile gives nil.
func NewProfile(*configs.Seccomp) (*Profile, error) { return nil, nil }

// Open gives nil.
func (c *Cache) Open(*Profile) (*os.File, error) { return nil, nil }

// Fill does nothing.
func (c *Cache) Fill(*Profile) error { return nil }
