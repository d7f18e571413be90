package mountns

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// here is the current directory as the kernel takes it.
var here = [...]byte{'.', 0}

// moveThreads moves all threads of the process into the mount namespace of the calling
// one, which is the first of the process. It returns false, and has changed nothing,
// where that is not possible.
//
// A thread that shares its working directory with others may not enter another mount
// namespace, unless it enters one of another kind by the same call: then the kernel
// changes the directories of all after it has entered. So each thread enters the UTS
// namespace that it is in already, too. The directories are then set back.
func moveThreads() (bool, error) {
	// These are in the new namespace already.
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, nil
	}
	defer unix.Close(root)
	work, err := unix.Open(".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, nil
	}
	defer unix.Close(work)
	// A process's namespaces are those of its first thread.
	self, err := unix.PidfdOpen(unix.Getpid(), 0)
	if err != nil {
		return false, nil
	}
	defer unix.Close(self)
	// The call is made on one thread first, and on no other if it fails there.
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_SETNS, uintptr(self), unix.CLONE_NEWNS|unix.CLONE_NEWUTS, 0); errno != 0 {
		return false, nil
	}
	for _, call := range []struct {
		number, arg uintptr
	}{
		{unix.SYS_FCHDIR, uintptr(root)},
		{unix.SYS_CHROOT, uintptr(unsafe.Pointer(&here))},
		{unix.SYS_FCHDIR, uintptr(work)},
	} {
		if _, _, errno := syscall.AllThreadsSyscall(call.number, call.arg, 0, 0); errno != 0 {
			return false, fmt.Errorf("set the directories of the threads: %w", errno)
		}
	}
	runtime.KeepAlive(&here)
	return true, nil
}
