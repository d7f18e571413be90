package userns

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// device is a character device of the node by its numbers; a minor of any stands for
// all of a major.
type device struct{ major, minor int32 }

const anyMinor = -1

// allowedDevices are what steps may open: their own devices, and terminals. It only
// backs up what there is anyway: no mount of a step has device nodes but these, and a
// step cannot make any.
var allowedDevices = []device{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {136, anyMinor}}

// blockSignals keeps signals from this thread, and the goroutine on it, until unblock is
// called: the kernel gives up checking a program (EAGAIN) when its thread gets one, and Go
// sends its threads some.
func blockSignals() (unblock func(), err error) {
	runtime.LockOSThread()
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, &before); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("block signals: %w", err)
	}
	return func() {
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil) // what it was is valid
		runtime.UnlockOSThread()
	}, nil
}

// limitDevices lets the processes of a cgroup, and of all below it, open allowedDevices
// only.
func limitDevices(cgroup *os.File) error {
	prog := deviceProgram(allowedDevices)
	license := []byte("Apache-2.0\x00")
	load := struct {
		kind, count    uint32
		insns, license uint64
		rest           [12]uint64
	}{
		kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, count: uint32(len(prog) / 8),
		insns: uint64(uintptr(unsafe.Pointer(&prog[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	unblock, err := blockSignals()
	if err != nil {
		return err
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&load)), unsafe.Sizeof(load))
	unblock()
	runtime.KeepAlive(prog)
	runtime.KeepAlive(license)
	if errno != 0 {
		return fmt.Errorf("load device filter: %w", errno)
	}
	defer unix.Close(int(fd))
	attach := struct{ target, prog, kind, flags, replace, pad uint32 }{
		target: uint32(cgroup.Fd()), prog: uint32(fd), kind: unix.BPF_CGROUP_DEVICE, flags: unix.BPF_F_ALLOW_MULTI,
	}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attach)), unsafe.Sizeof(attach)); errno != 0 {
		return fmt.Errorf("attach device filter: %w", errno)
	}
	return nil
}

// deviceProgram returns a program for the kernel that allows the making of nodes,
// which needs a capability that steps do not have, and the use of devices.
func deviceProgram(devices []device) []byte {
	const (
		load32, and, shiftRight, exit, set = 0x61, 0x57, 0x77, 0x95, 0xb7
		ifEqual, ifNotEqual                = 0x15, 0x55
		accessMknod, typeChar              = 1, 2
	)
	var out []byte
	emit := func(code, dst, src uint8, off int16, imm int32) {
		out = append(out, code, src<<4|dst)
		out = binary.NativeEndian.AppendUint16(out, uint16(off))
		out = binary.NativeEndian.AppendUint32(out, uint32(imm))
	}
	ret := func(v int32) { emit(set, 0, 0, 0, v); emit(exit, 0, 0, 0, 0) }
	emit(load32, 2, 1, 0, 0) // access and type
	emit(load32, 3, 1, 0, 0)
	emit(and, 2, 0, 0, 0xffff)
	emit(shiftRight, 3, 0, 0, 16)
	emit(load32, 4, 1, 4, 0) // major
	emit(load32, 5, 1, 8, 0) // minor
	emit(ifNotEqual, 3, 0, 2, accessMknod)
	ret(1)
	emit(ifEqual, 2, 0, 2, typeChar)
	ret(0)
	for _, d := range devices {
		if d.minor == anyMinor {
			emit(ifNotEqual, 4, 0, 2, d.major)
		} else {
			emit(ifNotEqual, 4, 0, 3, d.major)
			emit(ifNotEqual, 5, 0, 2, d.minor)
		}
		ret(1)
	}
	ret(0)
	return out
}
