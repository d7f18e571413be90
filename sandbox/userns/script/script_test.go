package script

import (
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start starts an interpreter.
func start(t *testing.T) (*Conn, *exec.Cmd) {
	t.Helper()
	program, err := Program()
	require.NoError(t, err)
	defer program.Close()
	conn, theirs, err := Pair()
	require.NoError(t, err)
	defer theirs.Close()
	cmd := &exec.Cmd{Path: "/proc/self/fd/3", Args: []string{"init"}, Env: []string{}, ExtraFiles: []*os.File{theirs, program}}
	cmd.Path = "/proc/self/fd/4"
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { conn.Close(); _ = cmd.Wait() })
	return conn, cmd
}

func TestCallsAndResults(t *testing.T) {
	conn, cmd := start(t)
	s := New()
	s.Result(s.Do(unix.SYS_GETPID))
	got, err := conn.Run(s)
	require.NoError(t, err)
	require.EqualValues(t, cmd.Process.Pid, got)

	dir := t.TempDir()
	s = New()
	s.For("make file")
	s.Do(unix.SYS_MKDIRAT, unix.AT_FDCWD, dir, 0o755).Expect(unix.EEXIST)
	f := s.Do(unix.SYS_OPENAT, unix.AT_FDCWD, filepath.Join(dir, "f"), unix.O_CREAT|unix.O_WRONLY, 0o644)
	s.Result(s.Do(unix.SYS_WRITE, f, []byte("hello"), 5))
	s.Do(unix.SYS_CLOSE, f)
	got, err = conn.Run(s)
	require.NoError(t, err)
	require.EqualValues(t, 5, got)
	data, err := os.ReadFile(filepath.Join(dir, "f"))
	require.NoError(t, err)
	require.Equal(t, "hello", string(data))
}

func TestFailureStopsAndIsNamed(t *testing.T) {
	conn, _ := start(t)
	dir := t.TempDir()
	s := New()
	s.For("open what is not there")
	s.Do(unix.SYS_OPENAT, unix.AT_FDCWD, filepath.Join(dir, "none"), 0, 0)
	s.For("make a directory")
	s.Do(unix.SYS_MKDIRAT, unix.AT_FDCWD, filepath.Join(dir, "made"), 0o755)
	_, err := conn.Run(s)
	require.ErrorIs(t, err, unix.ENOENT)
	require.ErrorContains(t, err, "open what is not there")
	require.NoDirExists(t, filepath.Join(dir, "made"))

	// It goes on with the next script.
	s = New()
	s.Result(s.Do(unix.SYS_GETPPID))
	got, err := conn.Run(s)
	require.NoError(t, err)
	require.EqualValues(t, os.Getpid(), got)
}

func TestJumpOnZero(t *testing.T) {
	conn, _ := start(t)
	s := New()
	end := s.Label()
	s.Do(unix.SYS_GETPPID).OnZero(end) // not zero
	s.Do(unix.SYS_CLOSE_RANGE, 100, 100, 0).OnZero(end)
	s.Do(unix.SYS_EXIT_GROUP, 1)
	s.Place(end)
	_, err := conn.Run(s)
	require.NoError(t, err)
}

func TestRetryWhileBusy(t *testing.T) {
	conn, _ := start(t)
	var fds [2]int
	require.NoError(t, unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	defer unix.Close(fds[1])
	read := func(s *Script) *Script {
		got := s.Receive(fds[0])
		s.For("read")
		s.Result(s.Do(unix.SYS_READ, got[0], s.Put(make([]byte, 8)), 8))
		return s
	}
	_, err := conn.Run(read(New()))
	require.ErrorIs(t, err, unix.EAGAIN)
	s := read(New())
	s.calls[1].Retry()
	time.AfterFunc(50*time.Millisecond, func() { _, _ = unix.Write(fds[1], []byte("abc")) })
	n, err := conn.Run(s)
	require.NoError(t, err)
	require.EqualValues(t, 3, n)
	unix.Close(fds[0])
}

func TestDescriptors(t *testing.T) {
	conn, _ := start(t)
	var pipes [2]*os.File
	var err error
	pipes[0], pipes[1], err = os.Pipe()
	require.NoError(t, err)
	defer pipes[0].Close()
	defer pipes[1].Close()
	null, err := os.Open("/dev/null")
	require.NoError(t, err)
	defer null.Close()
	s := New()
	fds := s.Receive(int(null.Fd()), int(pipes[1].Fd()))
	s.Do(unix.SYS_DUP3, fds[1], 50, 0)
	s.Do(unix.SYS_WRITE, 50, []byte("through"), 7)
	_, err = conn.Run(s)
	require.NoError(t, err)
	b := make([]byte, 16)
	n, err := pipes[0].Read(b)
	require.NoError(t, err)
	require.Equal(t, "through", string(b[:n]))
}

func TestExecuteAndEnd(t *testing.T) {
	conn, cmd := start(t)
	s := New()
	s.For("execute")
	s.Do(unix.SYS_FCNTL, 3, unix.F_SETFD, unix.FD_CLOEXEC)
	s.Do(unix.SYS_EXECVE, "/no/such", s.Pointers([]string{"x"}), s.Pointers(nil))
	require.ErrorIs(t, conn.Execute(s), unix.ENOENT)
	s = New()
	s.Do(unix.SYS_EXECVE, "/bin/sh", s.Pointers([]string{"sh", "-c", "exit $X"}), s.Pointers([]string{"X=7"}))
	require.NoError(t, conn.Execute(s))
	require.Error(t, cmd.Wait())
	require.Equal(t, 7, cmd.ProcessState.ExitCode())
	_, err := conn.Run(New())
	require.ErrorIs(t, err, ErrEnded)
}

func TestInterpreterEndsWithItsSocket(t *testing.T) {
	conn, cmd := start(t)
	require.NoError(t, conn.Close())
	require.Error(t, cmd.Wait())
	require.Equal(t, 125, cmd.ProcessState.ExitCode())
}

func TestLargeScript(t *testing.T) {
	conn, _ := start(t)
	s := New()
	s.Do(unix.SYS_GETPID, strings.Repeat("x", 4<<20))
	_, err := conn.Run(s)
	require.NoError(t, err)
	s.Do(unix.SYS_GETPID, strings.Repeat("x", 4<<20))
	_, err = conn.Run(s)
	require.ErrorContains(t, err, "too large")
	_, err = conn.Run(New())
	require.NoError(t, err)
}

func TestMistakesInScripts(t *testing.T) {
	conn, _ := start(t)
	s := New()
	s.Do(unix.SYS_GETPID, "a\x00b")
	_, err := conn.Run(s)
	require.ErrorContains(t, err, "NUL")
	s = New()
	s.Do(unix.SYS_GETPID).OnZero(s.Label())
	_, err = conn.Run(s)
	require.ErrorContains(t, err, "label")
}

// TestInterpreterIsItsSource assembles the source for this machine again.
func TestInterpreterIsItsSource(t *testing.T) {
	dir := t.TempDir()
	obj, bin := filepath.Join(dir, "o"), filepath.Join(dir, "bin")
	out, err := exec.Command("as", "-o", obj, "asm/"+runtime.GOARCH+".S").CombinedOutput()
	require.NoError(t, err, string(out))
	out, err = exec.Command("objcopy", "-O", "binary", "-j", ".text", obj, bin).CombinedOutput()
	require.NoError(t, err, string(out))
	code, err := os.ReadFile(bin)
	require.NoError(t, err)
	require.Equal(t, interpreters[runtime.GOARCH].code, hex.EncodeToString(code))
}
