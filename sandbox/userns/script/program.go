package script

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The interpreter is a static program of about fifty instructions. Its source is
// in asm; a test assembles it again and compares.
var interpreters = map[string]struct {
	machine uint16
	code    string
}{
	"amd64": {62, "" +
		"bd000000204989ec4c8d6d20e8d60000004c8b6d00e8cd000000488b5d08483b5d100f838c000000" +
		"31c9488b54cb08488b4338480fa3c87303486312488954cdc0ffc183f90672e2488b7dc0488b75c8" +
		"488b55d04c8b55d84c8b45e04c8b4de8488b030f05488943484885c0750e488b4b504885c9743448" +
		"89cbeba24883f8f5750b488b5338480fbae23f7291483d01f0ffff72164889c148f7d94883f93f77" +
		"15488b5340480fa3ca730b4883c358e96affffff31c048895d0048894508488b4d184885c9740348" +
		"8b0948894d10bf030000004889eeba18000000b8010000000f05e91effffff4d39ec731cbf030000" +
		"004c89e64c89ea4c29e231c00f054885c07e064901c4ebdfc3bf7d000000b8e70000000f05",
	},
	"arm64": {183, "" +
		"1400a4d2f50314aa968200913a000094960240f938000094930640f9810a40f97f0201ebe2040054" +
		"691e40f90a0080d26b2200918c0201d16d8540f82e25ca9a4e000036ad0180b98d8500f84a050091" +
		"5f1900f123ffff548c0201d1800540a9820d41a9841542a9680240f9010000d4602600f9a00000b5" +
		"612a40f9e10100b4f30301aae6ffff171f2c00b161000054611e40f941fcffb71ffc3fb1e3000054" +
		"e10300cb3ffc00f1e8000054622240f94224c19a8200003673620191d8ffff17000080d2930200f9" +
		"800600f9810e40f9410000b4210040f9810a00f9600080d2e10314aa020380d2080880d2010000d4" +
		"c5ffff17bf0216eb42010054600080d2e10315aac20215cbe80780d2010000d41f0000f18d000054" +
		"b502008bf6ffff17c0035fd6a00f80d2c80b80d2010000d4",
	},
}

const (
	codeBase = 0x10000000
	// buffer is where scripts are in the interpreter's memory. Below it is some
	// room for its own use. All of it is taken from the kernel when touched only.
	buffer     = 0x20000000
	bufferRoom = 0x1000
	bufferSize = 8 << 20
)

// elf returns the interpreter for a machine with the given Go architecture.
func elf(arch string) ([]byte, error) {
	p, ok := interpreters[arch]
	if !ok {
		return nil, fmt.Errorf("no interpreter of scripts for %s", arch)
	}
	code, err := hex.DecodeString(p.code)
	if err != nil {
		return nil, fmt.Errorf("decode interpreter: %w", err)
	}
	const headers = 64 + 2*56
	size := uint64(headers + len(code))
	var b bytes.Buffer
	for _, v := range []any{
		[16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1},
		uint16(2), p.machine, uint32(1),
		uint64(codeBase + headers), uint64(64), uint64(0),
		uint32(0), uint16(64), uint16(56), uint16(2), uint16(64), uint16(0), uint16(0),
		// The program itself, readable and executable.
		uint32(1), uint32(5), uint64(0), uint64(codeBase), uint64(codeBase), size, size, uint64(0x10000),
		// The buffer, readable and writable.
		uint32(1), uint32(6), uint64(0), uint64(buffer - bufferRoom), uint64(buffer - bufferRoom), uint64(0), uint64(bufferRoom + bufferSize), uint64(0x1000),
		code,
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			return nil, fmt.Errorf("encode interpreter: %w", err)
		}
	}
	return b.Bytes(), nil
}

// ExitUntold is the exit code of the interpreter when nobody tells it what to do, or
// no longer.
const ExitUntold = 125

// Program returns the interpreter for this machine as a sealed file in memory:
// nobody can change it, whoever executes it.
func Program() (*os.File, error) {
	data, err := elf(runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("init", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err != nil {
		return nil, fmt.Errorf("make interpreter: %w", err)
	}
	writable := os.NewFile(uintptr(fd), "init")
	defer writable.Close()
	if _, err := writable.Write(data); err != nil {
		return nil, fmt.Errorf("make interpreter: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(writable.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("seal interpreter: %w", err)
	}
	// What is open for writing cannot be executed.
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", writable.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open interpreter: %w", err)
	}
	return f, nil
}
