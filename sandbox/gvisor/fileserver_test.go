package gvisor

import (
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// asker is the sandbox's side of a file server.
type asker struct {
	t    *testing.T
	conn *net.UnixConn
}

func newAsker(t *testing.T, root string, sockets bool) asker {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	s, err := serveFiles(os.NewFile(uintptr(fd), root), sockets)
	require.NoError(t, err)
	dup, err := unix.Dup(int(s.theirs.Fd()))
	require.NoError(t, err)
	conn, err := unixConn(os.NewFile(uintptr(dup), "asker"))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close(); require.NoError(t, s.close()) })
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	return asker{t, conn}
}

// ask sends a request and returns the answer, the file with it, and the error in it.
func (a asker) ask(kind uint16, payload []byte) ([]byte, *os.File, error) {
	msg := binary.LittleEndian.AppendUint32(nil, uint32(len(payload)))
	msg = append(binary.LittleEndian.AppendUint16(msg, kind), 0, 0)
	_, err := a.conn.Write(append(msg, payload...))
	require.NoError(a.t, err)
	buf, rights := make([]byte, 1<<17), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := a.conn.ReadMsgUnix(buf, rights)
	require.NoError(a.t, err)
	require.GreaterOrEqual(a.t, n, 8, "the connection has ended")
	var file *os.File
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(rights[:oobn])
		require.NoError(a.t, err)
		fds, err := unix.ParseUnixRights(&msgs[0])
		require.NoError(a.t, err)
		file = os.NewFile(uintptr(fds[0]), "received")
		a.t.Cleanup(func() { file.Close() })
	}
	if binary.LittleEndian.Uint16(buf[4:]) == msgError {
		return nil, file, unix.Errno(binary.LittleEndian.Uint32(buf[8:]))
	}
	require.Equal(a.t, kind, binary.LittleEndian.Uint16(buf[4:]))
	return buf[8:n], file, nil
}

func numbers(values ...uint64) (out []byte) {
	for _, v := range values {
		out = binary.LittleEndian.AppendUint64(out, v)
	}
	return out
}

func walkTo(names ...string) []byte {
	out := binary.LittleEndian.AppendUint16(numbers(rootNumber), uint16(len(names)))
	for _, n := range names {
		out = appendString(out, n)
	}
	return out
}

func TestFileServer(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	require.NoError(t, os.WriteFile(outside+"/secret", nil, 0o600))
	require.NoError(t, os.MkdirAll(dir+"/a/b", 0o755))
	require.NoError(t, os.Symlink(outside, dir+"/a/out"))
	require.NoError(t, os.Symlink("b", dir+"/a/link"))
	require.NoError(t, unix.Lsetxattr(dir+"/a/link", "security.kiln", []byte("seen"), 0))
	require.NoError(t, unix.Lsetxattr(dir+"/a/link", "trusted.kiln", []byte("hidden"), 0))
	require.NoError(t, unix.Mkfifo(dir+"/fifo", 0o600))
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	require.NoError(t, err)
	defer l.Close()

	a := newAsker(t, dir, false)
	_, root, err := a.ask(msgMount, nil)
	require.NoError(t, err)
	_, err = os.Stat(procPath(root) + "/a/b")
	require.NoError(t, err)
	_, opened, err := a.ask(msgOpen, numbers(rootNumber, unix.O_RDONLY))
	require.NoError(t, err)
	names, err := opened.Readdirnames(-1)
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"a", "fifo", "socket"}, names)

	reply, _, err := a.ask(msgWalk, walkTo("a", "link"))
	require.NoError(t, err)
	number := binary.LittleEndian.Uint64(reply[3+inodeSize:])
	reply, _, err = a.ask(msgListXattr, numbers(number, 1000))
	require.NoError(t, err)
	require.Equal(t, append([]byte{1, 0}, appendString(nil, "security.kiln")...), reply)
	get := func(name string) []byte { return appendString(append(numbers(number), 0, 4, 0, 0), name) }
	reply, _, err = a.ask(msgGetXattr, get("security.kiln"))
	require.NoError(t, err)
	require.Equal(t, appendString(nil, "seen"), reply)

	for name, c := range map[string]struct {
		kind uint16
		data []byte
		want error
	}{
		"an attribute for the node's root alone": {msgGetXattr, get("trusted.kiln"), unix.EPERM},
		"up":                                     {msgWalk, walkTo("a", ".."), unix.EINVAL},
		"a path in a name":                       {msgWalk, walkTo("a/b"), unix.EINVAL},
		"no name":                                {msgWalk, walkTo(""), unix.EINVAL},
		"through a symlink":                      {msgWalk, walkTo("a", "out", "secret"), unix.ELOOP},
		"through a symlink inside":               {msgWalk, walkTo("a", "link", "c"), unix.ELOOP},
		"a number that was not given":            {msgListXattr, numbers(1<<40, 0), unix.EBADF},
		"opening what is not the root":           {msgOpen, numbers(number, 0), unix.EBADF},
		"sockets where there are none":           {msgConnect, numbers(rootNumber, unix.SOCK_STREAM), unix.EOPNOTSUPP},
		"a request that is not known":            {8, nil, unix.EOPNOTSUPP},
	} {
		_, file, err := a.ask(c.kind, c.data)
		require.Equal(t, c.want, err, name)
		require.Nil(t, file, name)
	}

	for name, message := range map[string]string{
		"too long": "\xff\xff\xff\x7f\x05\x00\x00\x00", "too short": "\x03\x00\x00\x00\x05\x00\x00\x00abc",
		"names that are missing": "\x0a\x00\x00\x00\x05\x00\x00\x00" + string(numbers(rootNumber)) + "\xff\xff",
	} {
		b := newAsker(t, dir, false)
		_, err := b.conn.Write([]byte(message))
		require.NoError(t, err)
		_, err = b.conn.Read(make([]byte, 1))
		require.Error(t, err, name)
	}

	// A number is free again when it is given back, and there is an end of them.
	deep := strings.Repeat("d", 250)
	require.NoError(t, os.Mkdir(filepath.Join(dir, deep), 0o755))
	for err == nil {
		_, _, err = a.ask(msgWalk, walkTo(deep))
	}
	require.Equal(t, unix.EMFILE, err)
	_, _, err = a.ask(msgClose, append([]byte{1, 0}, numbers(number+1)...))
	require.NoError(t, err)
	_, _, err = a.ask(msgWalk, walkTo(deep))
	require.NoError(t, err)

	_, _, err = newAsker(t, dir+"/fifo", false).ask(msgOpen, numbers(rootNumber, unix.O_RDONLY))
	require.Equal(t, unix.ENXIO, err)
	s := newAsker(t, dir+"/socket", true)
	_, conn, err := s.ask(msgConnect, numbers(rootNumber, unix.SOCK_STREAM))
	require.NoError(t, err)
	require.NotNil(t, conn)
}
