package script

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is our end of an interpreter's socket. It is not safe for concurrent use,
// except for Close.
type Conn struct{ sock *net.UnixConn }

// ErrEnded is returned when the interpreter has ended.
var ErrEnded = errors.New("the process has ended")

// CallError tells which call of a script failed.
type CallError struct {
	// What is what the call was for.
	What string
	// Call is the number of the system call.
	Call  uintptr
	Errno syscall.Errno
}

func (e *CallError) Error() string {
	if e.What == "" {
		return fmt.Sprintf("system call %d: %v", e.Call, e.Errno)
	}
	return fmt.Sprintf("%s: %v", e.What, e.Errno)
}

func (e *CallError) Unwrap() error { return e.Errno }

// Pair returns our end of a new socket, and the end that an interpreter needs as
// its descriptor 3.
func Pair() (*Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "script"), os.NewFile(uintptr(fds[1]), "script")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("use socket: %w", err)
	}
	return &Conn{conn.(*net.UnixConn)}, theirs, nil
}

// Close ends the interpreter, if it has not executed another program.
func (c *Conn) Close() error { return c.sock.Close() }

// Abort lets every current and later use of c fail.
func (c *Conn) Abort() { _ = c.sock.SetDeadline(time.Unix(1, 0)) }

// Run runs a script and returns its result. The error is a *CallError when a call
// failed, and wraps ErrEnded when the interpreter has ended.
func (c *Conn) Run(s *Script) (int64, error) {
	if err := c.send(s); err != nil {
		return 0, err
	}
	return c.answer(s)
}

// Execute runs a script that ends by executing another program. It returns when
// that program runs, or when the script has failed.
func (c *Conn) Execute(s *Script) error {
	_, err := c.Run(s)
	switch {
	case errors.Is(err, ErrEnded):
		return nil
	case err == nil:
		return errors.New("run script: it executes no program")
	}
	return err
}

func (c *Conn) send(s *Script) error {
	msg, err := s.encode()
	if err != nil {
		return err
	}
	if _, err := c.sock.Write(msg); err != nil {
		return ended("send script", err)
	}
	if len(s.fds) > 0 {
		if _, _, err := c.sock.WriteMsgUnix([]byte{0}, unix.UnixRights(s.fds...), nil); err != nil {
			return ended("send descriptors", err)
		}
	}
	return nil
}

// RunForFile is like Run for a script that sends one byte with one descriptor over
// its socket, and returns that descriptor. SendFile adds the sending.
func (c *Conn) RunForFile(s *Script, name string) (*os.File, error) {
	if err := c.send(s); err != nil {
		return nil, err
	}
	first, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.sock.ReadMsgUnix(first, oob)
	if err != nil {
		return nil, ended("wait for descriptor", err)
	}
	if n == 0 { // the answer to a script that failed before
		if _, err = c.answerAfter(first, s); err == nil {
			err = errors.New("run script: no descriptor received")
		}
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, errors.Join(errors.New("run script: no descriptor received"), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.Join(errors.New("run script: no descriptor received"), err)
	}
	unix.CloseOnExec(fds[0])
	f := os.NewFile(uintptr(fds[0]), name)
	if _, err := c.answer(s); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Answer waits for the next answer of an interpreter to a script that another one
// has sent it.
func (c *Conn) Answer(s *Script) error {
	_, err := c.answer(s)
	return err
}

func (c *Conn) answer(s *Script) (int64, error) { return c.answerAfter(nil, s) }

// answerAfter reads the rest of an answer that starts with first.
func (c *Conn) answerAfter(first []byte, s *Script) (int64, error) {
	var b [24]byte
	if _, err := io.ReadFull(c.sock, b[copy(b[:], first):]); err != nil {
		return 0, ended("wait for script", err)
	}
	at := binary.LittleEndian.Uint64(b[:])
	errno := -int64(binary.LittleEndian.Uint64(b[8:]))
	if errno == 0 {
		return int64(binary.LittleEndian.Uint64(b[16:])), nil
	}
	failed := &CallError{Errno: syscall.Errno(errno)}
	if call := s.callAt(at); call != nil {
		failed.What, failed.Call = call.what, call.nr
	}
	return 0, failed
}

// ended makes errors that say that the other end is closed recognisable.
func ended(what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("%s: %w", what, ErrEnded)
	}
	return fmt.Errorf("%s: %w", what, err)
}
