// Memory takes memory in every size that a sandbox has a way of its own for, wants it to
// be empty and fills it, as often as its argument says. With another argument, it writes
// where it may only read.
package main

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

const page = 4096

func check(what string, size int, memory []byte) {
	for i, b := range memory {
		if b != 0 {
			fmt.Printf("%s of %d bytes: byte %d is %#x\n", what, size, i, b)
			os.Exit(1)
		}
	}
	for i := range memory {
		memory[i] = 0xa5
	}
}

// grow moves the end of the program's data.
func grow(size int) []byte {
	end, _, _ := syscall.RawSyscall(syscall.SYS_BRK, 0, 0, 0)
	end = (end + page - 1) &^ (page - 1)
	if got, _, _ := syscall.RawSyscall(syscall.SYS_BRK, end+uintptr(size), 0, 0); got != end+uintptr(size) {
		fmt.Println("brk failed")
		os.Exit(1)
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(end)), size) // memory that Go does not know
}

func mapped(size int) []byte {
	memory, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	return memory
}

// readOnly takes the right to write from memory that holds something, and gives it back.
func readOnly(memory []byte) {
	for _, rights := range []int{syscall.PROT_READ, syscall.PROT_READ | syscall.PROT_WRITE} {
		if err := syscall.Mprotect(memory, rights); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		if memory[0] != 0xa5 || memory[len(memory)-1] != 0xa5 {
			fmt.Println("memory changed with its rights")
			os.Exit(1)
		}
	}
}

func main() {
	rounds, err := strconv.Atoi(os.Args[1])
	if err != nil {
		panic(err)
	}
	if len(os.Args) > 2 { // writes to what it may only read
		memory := mapped(8 * page)
		check("mapping", len(memory), memory)
		if err := syscall.Mprotect(memory[:4*page], syscall.PROT_READ); err != nil {
			panic(err)
		}
		memory[4*page] = 1
		memory[0] = 1
		fmt.Println("wrote")
		return
	}
	for range rounds {
		for _, size := range []int{page, 33 * page, 255 * page, 257 * page, 512 * page, 513 * page, 1024 * page, 8192 * page} {
			memory := mapped(size)
			check("mapping", size, memory)
			readOnly(memory)
			if err := syscall.Munmap(memory); err != nil {
				panic(err)
			}
			check("data", size, grow(size))
		}
	}
	fmt.Println("empty")
}
