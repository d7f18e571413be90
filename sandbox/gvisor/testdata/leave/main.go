// Command leave makes IPC objects that outlive processes, and says which it has found.
package main

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

const (
	key     = 4711
	creat   = 0o1000
	private = 0o600
)

func main() {
	for _, c := range []struct {
		name        string
		call        uintptr
		args, flags [2]uintptr
	}{
		{"shared memory", syscall.SYS_SHMGET, [2]uintptr{key, 4096}, [2]uintptr{private, private | creat}},
		{"message queue", syscall.SYS_MSGGET, [2]uintptr{key, private}, [2]uintptr{0, creat}},
		{"semaphore", syscall.SYS_SEMGET, [2]uintptr{key, 1}, [2]uintptr{private, private | creat}},
	} {
		find, make := c.args, c.args
		flags := c.flags
		if c.call == syscall.SYS_MSGGET {
			find, make, flags = [2]uintptr{key, private}, [2]uintptr{key, private | creat}, [2]uintptr{}
		}
		if _, _, errno := syscall.Syscall(c.call, find[0], find[1], flags[0]); errno == 0 {
			fmt.Println("found", c.name)
		}
		if _, _, errno := syscall.Syscall(c.call, make[0], make[1], flags[1]); errno != 0 {
			fmt.Println("cannot make", c.name, errno)
			os.Exit(1)
		}
	}
	name, _ := syscall.BytePtrFromString("kiln")
	open := func(flags uintptr) syscall.Errno {
		_, _, errno := syscall.Syscall6(syscall.SYS_MQ_OPEN, uintptr(unsafe.Pointer(name)), flags, private, 0, 0, 0)
		return errno
	}
	if open(syscall.O_RDWR) == 0 {
		fmt.Println("found POSIX message queue")
	}
	if errno := open(syscall.O_RDWR | syscall.O_CREAT); errno != 0 {
		fmt.Println("no POSIX message queues:", errno)
	}
}
