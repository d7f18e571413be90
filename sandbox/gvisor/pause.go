package gvisor

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
)

// The first process of every sandbox is a static program of a few instructions
// that comes from the node as an open file, so that no image needs to have it. It
// lets the sandbox reap orphans by ignoring SIGCHLD, and sleeps: the sandbox ends
// with its first process.

// pauseCode holds the program's machine code. It ends where its data begin.
var pauseCode = map[string]func() ([]byte, uint16){
	"amd64": func() ([]byte, uint16) {
		return []byte{
			0xb8, 13, 0, 0, 0, // mov eax, SYS_rt_sigaction
			0xbf, 17, 0, 0, 0, // mov edi, SIGCHLD
			0x48, 0x8d, 0x35, 19, 0, 0, 0, // lea rsi, [data]
			0x31, 0xd2, // xor edx, edx
			0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
			0x0f, 0x05, // syscall
			0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
			0x0f, 0x05, // syscall
			0xeb, 0xf7, // jmp to pause
		}, 62
	},
	"arm64": func() ([]byte, uint16) {
		movz := func(reg, imm uint32) uint32 { return 0xd2800000 | imm<<5 | reg }
		const svc = 0xd4000001
		ins := []uint32{
			movz(0, 17),        // SIGCHLD
			0x10000001 | 13<<5, // adr x1, data (13 instructions ahead)
			movz(2, 0),         //
			movz(3, 8),         //
			movz(8, 134), svc,  // rt_sigaction
			movz(0, 0),       //
			movz(1, 0),       //
			movz(2, 0),       //
			movz(3, 0),       //
			movz(4, 0),       //
			movz(8, 73), svc, // ppoll
			0x14000000 | (1<<26 - 6), // b to the first instruction of ppoll
			0xd503201f,               // nop
		}
		var b bytes.Buffer
		_ = binary.Write(&b, binary.LittleEndian, ins)
		return b.Bytes(), 183
	},
}

// pauseProgram returns the program as an ELF file for this machine.
func pauseProgram() ([]byte, error) {
	gen, ok := pauseCode[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("no gVisor sandboxes on %s", runtime.GOARCH)
	}
	code, machine := gen()
	// The data are a struct sigaction with the handler SIG_IGN.
	data := append([]byte{1}, make([]byte, 31)...)
	const base, headers = 0x400000, 64 + 56
	size := uint64(headers + len(code) + len(data))
	var b bytes.Buffer
	for _, v := range []any{
		[16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1},
		uint16(2), machine, uint32(1),
		uint64(base + headers), uint64(64), uint64(0),
		uint32(0), uint16(64), uint16(56), uint16(1), uint16(64), uint16(0), uint16(0),
		// One segment, readable and executable.
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(0x10000),
		code, data,
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

// writePause writes the program below dir and returns its path.
func writePause(dir string) (string, error) {
	program, err := pauseProgram()
	if err != nil {
		return "", err
	}
	name := filepath.Join(dir, "pause")
	if err := os.RemoveAll(name); err != nil {
		return "", fmt.Errorf("write the first process of sandboxes: %w", err)
	}
	if err := os.WriteFile(name, program, 0o555); err != nil {
		return "", fmt.Errorf("write the first process of sandboxes: %w", err)
	}
	return name, nil
}
