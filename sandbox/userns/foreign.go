package userns

import (
	"debug/elf"

	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// foreignLoaders are what images have that run 32-bit programs on a 64-bit node.
var foreignLoaders = []string{
	"lib/ld-linux.so.2", "lib/ld-linux-armhf.so.3", "lib/ld-musl-i386.so.1", "lib/ld-musl-armhf.so.1", "libx32",
}

// runsForeign reports whether the root file system at rootfs is made for programs
// of another architecture than the node's first.
//
// The system call filter has a part for each architecture, and building one costs
// a step several milliseconds; a part that no program needs is left out. Calls of
// an architecture that the filter has no part for end the process.
func runsForeign(rootfs string) bool {
	for _, name := range foreignLoaders {
		if h, err := pathrs.OpenInRoot(rootfs, name); err == nil {
			h.Close()
			return true
		}
	}
	h, err := pathrs.OpenInRoot(rootfs, "bin/sh")
	if err != nil {
		return true // not an ordinary root: better safe
	}
	defer h.Close()
	if st, err := h.Stat(); err != nil || !st.Mode().IsRegular() {
		return true
	}
	f, err := pathrs.Reopen(h, unix.O_RDONLY)
	if err != nil {
		return true
	}
	defer f.Close()
	sh, err := elf.NewFile(f)
	return err != nil || sh.Class != elf.ELFCLASS64
}
