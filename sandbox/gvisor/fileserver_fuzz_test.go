package gvisor

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// walkOf is the payload of a walk.
func walkOf(from uint64, names ...string) []byte {
	out := binary.LittleEndian.AppendUint64(nil, from)
	out = binary.LittleEndian.AppendUint16(out, uint16(len(names)))
	for _, n := range names {
		out = appendString(out, n)
	}
	return out
}

// FuzzFileServer asks what a sandbox could that the step rules. Nothing outside of the
// mount gets a number or is opened, and what the server keeps is bounded.
func FuzzFileServer(f *testing.F) {
	dir := f.TempDir()
	require.NoError(f, os.MkdirAll(filepath.Join(dir, "root/sub"), 0o755))
	require.NoError(f, os.WriteFile(filepath.Join(dir, "outside"), nil, 0o644))
	require.NoError(f, os.Symlink("../outside", filepath.Join(dir, "root/link")))
	require.NoError(f, os.Symlink("/", filepath.Join(dir, "root/top")))
	number := func(n uint64, rest ...byte) []byte { return append(binary.LittleEndian.AppendUint64(nil, n), rest...) }
	f.Add(uint16(msgMount), []byte{}, uint16(msgOpen), number(rootNumber, 0, 0, 0, 0))
	f.Add(uint16(msgWalk), walkOf(rootNumber, "sub"), uint16(msgWalk), walkOf(2, "..", "outside"))
	f.Add(uint16(msgWalk), walkOf(rootNumber, "link"), uint16(msgListXattr), number(2))
	f.Add(uint16(msgWalk), walkOf(rootNumber, "top", "etc"), uint16(msgGetXattr), append(number(2, 0, 0, 0, 0), "\x0ctrusted.kiln"...))
	f.Add(uint16(msgClose), []byte{1, 0, 2, 0, 0, 0, 0, 0, 0, 0}, uint16(msgConnect), number(2, 1, 0, 0, 0))
	f.Add(uint16(msgClose), []byte{255, 255}, uint16(msgWalk), []byte{1, 0, 0, 0, 0, 0, 0, 0, 255, 255})
	f.Fuzz(func(t *testing.T, kind1 uint16, payload1 []byte, kind2 uint16, payload2 []byte) {
		fd, err := unix.Open(filepath.Join(dir, "root"), unix.O_PATH|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		root := os.NewFile(uintptr(fd), "root")
		defer root.Close()
		s := &fileServer{root: root, mode: unix.S_IFDIR, sockets: true, names: map[uint64]string{}, next: rootNumber + 1}
		for _, m := range []struct {
			kind    uint16
			payload []byte
		}{{kind1, payload1}, {kind2, payload2}} {
			_, file, err := s.answer(m.kind, &request{data: m.payload})
			if err == nil && m.kind == msgOpen {
				target, err := os.Readlink(procPath(file))
				require.NoError(t, err)
				require.Equal(t, root.Name(), filepath.Base(target))
			}
			if file != nil && file != root {
				file.Close()
			}
		}
		size := 0
		for n, name := range s.names {
			require.Greater(t, n, uint64(rootNumber))
			require.True(t, filepath.IsLocal(name) && !strings.Contains(name, "//"), name)
			size += len(name)
		}
		require.Equal(t, size, s.size)
	})
}
