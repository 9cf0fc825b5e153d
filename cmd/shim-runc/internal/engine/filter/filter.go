//go:build cgo && seccomp

package filter

/*
#cgo LDFLAGS: -lseccomp
#cgo LDFLAGS: -Wl,--wrap=seccomp_init -Wl,--wrap=seccomp_reset -Wl,--wrap=seccomp_merge
#cgo LDFLAGS: -Wl,--wrap=seccomp_arch_add -Wl,--wrap=seccomp_arch_remove -Wl,--wrap=seccomp_attr_set
#cgo LDFLAGS: -Wl,--wrap=seccomp_syscall_priority -Wl,--wrap=seccomp_rule_add_array -Wl,--wrap=seccomp_rule_add_exact_array
#cgo LDFLAGS: -Wl,--wrap=seccomp_load -Wl,--wrap=seccomp_export_pfc -Wl,--wrap=seccomp_export_bpf
#include "interpose.h"
*/
import "C"

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// takenFD is where the init of a container finds a filter: the first descriptor behind the standard streams.
const takenFD = 3

// seals are those of a file with a filter: what is in it stays as it is.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Take looks for a filter that the shim has handed over, and has libcontainer use it. It is to be called once, in a
// container's init, before libcontainer is. A container's program never sees the file.
func Take() {
	if have, err := unix.FcntlInt(takenFD, unix.F_GET_SEALS, 0); err != nil || have&seals != seals {
		return // another file: no filter was handed over
	}
	var st unix.Stat_t
	if unix.Fstat(takenFD, &st) != nil || st.Size == 0 || st.Size > maxSize {
		return
	}
	data, err := unix.Mmap(takenFD, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return
	}
	calls, program, err := lengths(data, st.Size)
	if err != nil {
		_ = unix.Munmap(data)
		return
	}
	unix.CloseOnExec(takenFD)
	C.filter_offer(unsafe.Pointer(&data[headSize]), C.size_t(calls), unsafe.Pointer(&data[headSize+calls]), C.size_t(program))
}

// Main is a process of Verb: it runs Compile on its standard streams and exits.
func Main() {
	if err := Compile(os.Stdin, os.Stdout); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Compile reads a profile, a configs.Seccomp as JSON, and writes the filter for it, as Cache keeps it. It is for a process
// of its own, and loads nothing.
func Compile(in io.Reader, out io.Writer) error {
	var config configs.Seccomp
	if err := json.NewDecoder(in).Decode(&config); err != nil {
		return fmt.Errorf("cannot read a seccomp profile: %w", err)
	}
	program, err := memfd("seccomp-program")
	if err != nil {
		return err
	}
	defer func() { _ = program.Close() }()
	C.filter_record(C.int(program.Fd()))
	_, err = seccomp.InitSeccomp(&config)
	var n C.size_t
	calls := C.filter_recorded(&n)
	if calls == nil {
		return fmt.Errorf("nothing was compiled: %w", errors.Join(err, unix.ECANCELED))
	}
	if _, err := program.Seek(0, io.SeekStart); err != nil {
		return err
	}
	data, err := io.ReadAll(program)
	if err != nil {
		return fmt.Errorf("cannot read the compiled filter: %w", err)
	}
	_, err = out.Write(format(C.GoBytes(calls, C.int(n)), data))
	return err
}

// magic begins every filter, and says how it is laid out: the lengths of the calls and of the program, 4 bytes each in the
// machine's order, then these two.
var magic = []byte("scmpflt1")

// maxSize is more than any filter can have: the kernel takes 4096 instructions of 8 bytes, and libseccomp's callers cannot
// make more rules than there are in 1 MiB.
const maxSize = 1 << 20

func format(calls, program []byte) []byte {
	out := append([]byte(nil), magic...)
	out = binary.NativeEndian.AppendUint32(out, uint32(len(calls)))
	out = binary.NativeEndian.AppendUint32(out, uint32(len(program)))
	return append(append(out, calls...), program...)
}

// headSize is the length of what is before the calls.
const headSize = 16

// lengths reads the head of a filter that has size bytes in all.
func lengths(head []byte, size int64) (calls, program int64, err error) {
	if len(head) < headSize || string(head[:len(magic)]) != string(magic) {
		return 0, 0, errors.New("it is no filter")
	}
	calls = int64(binary.NativeEndian.Uint32(head[len(magic):]))
	program = int64(binary.NativeEndian.Uint32(head[len(magic)+4:]))
	if calls == 0 || program == 0 || program%8 != 0 || headSize+calls+program != size || size > maxSize {
		return 0, 0, fmt.Errorf("%d bytes of calls and %d of program are not what is in %d", calls, program, size)
	}
	return calls, program, nil
}

func memfd(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
