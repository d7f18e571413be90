// Exact makes files below /exact of every kind that a layer can hold, with
// attributes, times and holes that are easily lost.
package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const dir = "/exact"

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func file(name string, content []byte) string {
	p := filepath.Join(dir, name)
	must(os.WriteFile(p, content, 0o644))
	return p
}

func main() {
	must(os.Mkdir(dir, 0o755))
	capability := []byte{1, 0, 0, 2, 0xc0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	program := file("capable", []byte("program"))
	must(unix.Setxattr(program, "security.capability", capability, 0))
	binary := make([]byte, 256)
	for i := range binary {
		binary[i] = byte(i)
	}
	attrs := file("attributes", nil)
	for _, p := range []string{attrs, dir} {
		must(unix.Setxattr(p, "user.empty", nil, 0))
		must(unix.Setxattr(p, "user.binary", binary, 0))
		must(unix.Setxattr(p, "user.=name\xff", []byte("="), 0))
	}
	file("big", bytes.Repeat([]byte("0123456789abcdef"), 1<<16))
	f, err := os.Create(filepath.Join(dir, "sparse"))
	must(err)
	for _, off := range []int64{0, 100 << 20, 1<<36 - 1} {
		_, err := f.WriteAt([]byte("x"), off)
		must(err)
	}
	must(f.Close())
	f, err = os.Create(filepath.Join(dir, "hole"))
	must(err)
	must(f.Truncate(1<<36 + 5))
	must(f.Close())
	must(unix.Mkfifo(filepath.Join(dir, "fifo"), 0o640))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "socket"), Net: "unix"})
	must(err)
	l.SetUnlinkOnClose(false)
	must(l.Close())
	must(os.Link(program, filepath.Join(dir, "linked")))
	must(os.Symlink("capable", filepath.Join(dir, "symlink")))
	must(os.Mkdir(filepath.Join(dir, "sub"), 0o711))
	names, err := os.ReadDir(dir)
	must(err)
	for i, n := range append(names, nil) {
		p := dir
		if n != nil {
			p = filepath.Join(dir, n.Name())
		}
		ts := unix.Timespec{Sec: 1500000000 + int64(i), Nsec: 123456789}
		must(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
}
