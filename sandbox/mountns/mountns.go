// Package mountns gives this process a mount namespace of its own.
//
// What the process mounts in it, and what its children mount, is gone from the
// node when the last of them ends, however they end; the node's other processes
// never see any of it. Mounts that the node makes later still appear.
package mountns

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// marker tells the process, after it has executed itself again, that it is done.
// Its value is the process ID, which execve keeps, so that a value left in the
// environment by another process is not believed.
const marker = "KILN_MOUNT_NAMESPACE_OF"

// Enter moves this process into a new mount namespace by executing it again, and
// returns nil in the second life. Call it first in main: nothing that the process
// did before is kept but its descriptors, its environment and its process ID.
//
// A Go process has threads before main starts, and a mount namespace belongs to a
// thread; execve from the thread that has the new one leaves only that.
func Enter() error {
	done, err := again()
	if done {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unshare(); err != nil {
		return err
	}
	return execAgain()
}

// EnterInPlace does what Enter does, but moves the threads of this process instead of
// executing it again, which takes as long as a program takes to start. Where that
// cannot be done it is Enter: the caller must be as prepared for that.
//
// It can be done on the process's first thread, to which the caller is locked, of a
// program without cgo, on Linux 5.8 or later. That thread has a working directory and
// a umask of its own afterwards, so the program has to change these before, or never.
func EnterInPlace() error {
	done, err := again()
	if done {
		return err
	}
	if unix.Gettid() != unix.Getpid() {
		return Enter()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unshare(); err != nil {
		return err
	}
	if moved, err := moveThreads(); moved || err != nil {
		return err
	}
	return execAgain()
}

// again tells whether this is the second life of the process.
func again() (bool, error) {
	if os.Getenv(marker) != strconv.Itoa(os.Getpid()) {
		return false, nil
	}
	return true, os.Unsetenv(marker)
}

// unshare gives the calling thread a new mount namespace.
func unshare() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace (needs CAP_SYS_ADMIN): %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts from the node: %w", err)
	}
	return nil
}

// execAgain starts the second life, in the namespace of the calling thread.
func execAgain() error {
	// The first of two entries of one name counts, so an old one must go.
	env := slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, marker+"=") })
	err := unix.Exec("/proc/self/exe", os.Args, append(env, marker+"="+strconv.Itoa(os.Getpid())))
	return fmt.Errorf("execute again: %w", err)
}
