// Command inplace enters a mount namespace while its threads come and go, mounts a file
// system on the directory that it is given, and prints what its threads see. It ends
// by killing itself.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox/mountns"
)

func init() { runtime.LockOSThread() }

func main() {
	fmt.Println("life")
	if root := os.Getenv("INPLACE_ROOT"); root != "" {
		check(unix.Chroot(root))
		check(unix.Chdir("/"))
	}
	// Threads that end, and new ones.
	for range 4 {
		go func() {
			for {
				done := make(chan struct{})
				go func() {
					defer close(done)
					runtime.LockOSThread() // ends with the goroutine
					time.Sleep(time.Microsecond)
				}()
				<-done
			}
		}()
	}
	check(mountns.EnterInPlace())
	check(unix.Mount("tmpfs", os.Args[1], "tmpfs", 0, ""))
	var tasks []string
	for len(tasks) < 3 {
		var err error
		tasks, err = filepath.Glob("/proc/self/task/*")
		check(err)
	}
	for _, task := range tasks {
		line := ""
		for _, link := range []string{"ns/mnt", "root", "cwd"} {
			to, err := os.Readlink(filepath.Join(task, link))
			if err != nil { // the thread has ended
				line = ""
				break
			}
			line += " " + to
		}
		if line != "" {
			fmt.Println("thread" + line)
		}
	}
	os.Stdout.Sync()
	check(unix.Kill(os.Getpid(), unix.SIGKILL))
	select {}
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
