package session

import (
	"fmt"
	"os"

	"golang.org/x/term"
)

// Console is the terminal that we are used from. The file stays the caller's.
type Console struct{ fd int }

// NewConsole takes f for one. It is an error if f is none.
func NewConsole(f *os.File) (*Console, error) {
	fd := int(f.Fd())
	if !term.IsTerminal(fd) {
		return nil, fmt.Errorf("%s is no terminal", f.Name())
	}
	return &Console{fd}, nil
}

// Size in characters.
func (c *Console) Size() (width, height int, err error) { return term.GetSize(c.fd) }

// raw has every key come to us as it is, and everything shown as it is written: the process's own terminal does what
// terminals do. restore makes it as it was before.
func (c *Console) raw() (restore func(), err error) {
	before, err := term.MakeRaw(c.fd)
	if err != nil {
		return nil, err
	}
	return func() { _ = term.Restore(c.fd, before) }, nil // what fails here is that the terminal is gone
}
