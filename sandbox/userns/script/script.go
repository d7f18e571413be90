// Package script runs system calls in another process.
//
// The process runs a tiny static program, the interpreter. It reads scripts from
// a socket, its descriptor 3: lists of system calls, whose arguments may be the
// results of earlier ones. It makes the calls one after the other and answers.
// When the socket is closed, it exits. So a process can set itself up in
// namespaces where no other program of the node should ever be, and then execute
// the program that it is for, all decided by the other side of the socket.
//
// The package promises that a call which fails stops its script, unless the
// script says that this failure is expected. The interpreter has no memory but
// its buffer, in which it holds the last script only, allocates nothing, and opens
// nothing by itself. Whoever holds the other end of its socket decides everything
// that it does: the socket must never get into other hands.
package script

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	headerSize = 32
	recordSize = 88
	// resultAt is where a record keeps the result of its call.
	resultAt = 72
	// MaxFDs is how many descriptors one Receive takes.
	MaxFDs = 250
)

// Script is a list of system calls. The first mistake in building it is reported
// when it is run. It is not safe for concurrent use.
type Script struct {
	data   []byte
	calls  []*Call
	result *Call
	what   string
	err    error
	fds    []int // to be sent along
}

// Call is a system call of a script.
type Call struct {
	nr     uintptr
	args   [6]any
	expect uint64
	retry  bool
	onZero *Label
	at     int
	what   string
}

// Label is a place in a script.
type Label struct{ at int }

// Addr is an address in the interpreter's memory.
type Addr uint64

// FD stands for a descriptor that the script receives.
type FD struct{ at Addr }

// New returns an empty script.
func New() *Script { return &Script{} }

// For says what the following calls are for, as errors name it: "mount /proc".
func (s *Script) For(format string, args ...any) { s.what = fmt.Sprintf(format, args...) }

// Do adds a system call. An argument is an int, uintptr or uint64; a string or
// []byte, which stand for the address of their content (strings with a zero at
// the end); an Addr; a *Call, which stands for the result of an earlier call, or
// an FD.
func (s *Script) Do(nr uintptr, args ...any) *Call {
	c := &Call{nr: nr, at: len(s.calls), what: s.what}
	if len(args) > len(c.args) {
		s.fail(fmt.Errorf("system call %d with %d arguments", nr, len(args)))
		args = args[:len(c.args)]
	}
	for i, a := range args {
		switch v := a.(type) {
		case string:
			if strings.IndexByte(v, 0) >= 0 {
				s.fail(fmt.Errorf("%s: NUL byte in %.40q", s.what, v))
			}
			c.args[i] = s.Put(append([]byte(v), 0))
		case []byte:
			c.args[i] = s.Put(v)
		case int, uintptr, uint64, uint32, Addr, *Call, FD:
			c.args[i] = v
		default:
			s.fail(fmt.Errorf("argument of type %T", a))
		}
	}
	s.calls = append(s.calls, c)
	return c
}

// Expect lets the script go on when the call fails with one of errs. They must be
// below 64.
func (c *Call) Expect(errs ...syscall.Errno) *Call {
	for _, e := range errs {
		c.expect |= 1 << (e & 63)
	}
	return c
}

// Retry has the call made again for as long as it fails with EAGAIN. It is for calls
// that fail so when something else happens at the same moment.
func (c *Call) Retry() *Call {
	c.retry = true
	return c
}

// OnZero lets the script go on at l when the call returns 0.
func (c *Call) OnZero(l *Label) *Call {
	c.onZero = l
	return c
}

// Label returns a place that Place puts into the script later.
func (s *Script) Label() *Label { return &Label{at: -1} }

// Place puts l before the next call, or at the end of the script.
func (s *Script) Place(l *Label) { l.at = len(s.calls) }

// Result makes the result of c what running the script returns.
func (s *Script) Result(c *Call) { s.result = c }

// Put puts data into the interpreter's memory.
func (s *Script) Put(data []byte) Addr {
	at := Addr(buffer + headerSize + len(s.data))
	s.data = append(s.data, data...)
	for len(s.data)%8 != 0 {
		s.data = append(s.data, 0)
	}
	return at
}

// Words puts 64-bit words into the interpreter's memory.
func (s *Script) Words(words ...uint64) Addr {
	b := make([]byte, 0, 8*len(words))
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return s.Put(b)
}

// Pointers puts strings and a list of pointers to them, with a zero at its end,
// into the interpreter's memory, as execve takes them.
func (s *Script) Pointers(list []string) Addr {
	words := make([]uint64, 0, len(list)+1)
	for _, v := range list {
		words = append(words, uint64(s.Put(append([]byte(v), 0))))
	}
	return s.Words(append(words, 0)...)
}

// Receive adds the receipt of copies of fds, which must stay open until the script
// has run. In the other process they are closed on execve. A script can receive
// once only.
func (s *Script) Receive(fds ...int) []FD {
	if len(s.fds) > 0 || len(fds) > MaxFDs {
		s.fail(fmt.Errorf("script receives %d descriptors: only once, and at most %d, are possible", len(fds), MaxFDs))
		fds = fds[:min(len(fds), MaxFDs)]
	}
	if len(fds) == 0 {
		return nil
	}
	s.fds = fds
	control := unix.CmsgSpace(4 * len(fds))
	room := s.Put(make([]byte, control))
	iov := s.Words(uint64(s.Put(make([]byte, 8))), 1)
	msg := s.Words(0, 0, uint64(iov), 1, uint64(room), uint64(control), 0)
	was := s.what
	s.For("receive descriptors")
	s.Do(unix.SYS_RECVMSG, 3, msg, unix.MSG_CMSG_CLOEXEC)
	s.what = was
	got := make([]FD, len(fds))
	for i := range got {
		got[i] = FD{room + Addr(unix.CmsgLen(0)+4*i)}
	}
	return got
}

// SendFile adds the sending of a copy of the descriptor fd for RunForFile.
func (s *Script) SendFile(fd int) {
	control := s.Put(unix.UnixRights(fd))
	iov := s.Words(uint64(s.Put(make([]byte, 8))), 1)
	msg := s.Words(0, 0, uint64(iov), 1, uint64(control), uint64(unix.CmsgSpace(4)), 0)
	s.Do(unix.SYS_SENDMSG, 3, msg, unix.MSG_NOSIGNAL)
}

func (s *Script) fail(err error) {
	if s.err == nil {
		s.err = fmt.Errorf("build script: %w", err)
	}
}

// encode returns the script as the interpreter reads it.
func (s *Script) encode() ([]byte, error) {
	if s.err != nil {
		return nil, s.err
	}
	start := uint64(buffer + headerSize + len(s.data))
	record := func(i int) uint64 { return start + uint64(i*recordSize) }
	end := record(len(s.calls))
	if end > buffer+bufferSize {
		return nil, errors.New("script is too large: the program's arguments and environment take several megabytes")
	}
	var result uint64
	if s.result != nil {
		result = record(s.result.at) + resultAt
	}
	out := make([]byte, 0, end-buffer)
	word := func(v uint64) { out = binary.LittleEndian.AppendUint64(out, v) }
	word(end)
	word(start)
	word(end)
	word(result)
	out = append(out, s.data...)
	for _, c := range s.calls {
		word(uint64(c.nr))
		var indirect uint64
		for i, a := range c.args {
			switch v := a.(type) {
			case nil:
				word(0)
			case int:
				word(uint64(v))
			case uint32:
				word(uint64(v))
			case uintptr:
				word(uint64(v))
			case uint64:
				word(v)
			case Addr:
				word(uint64(v))
			case FD:
				indirect |= 1 << i
				word(uint64(v.at))
			case *Call:
				indirect |= 1 << i
				word(record(v.at) + resultAt)
			}
		}
		if c.retry {
			indirect |= 1 << 63
		}
		word(indirect)
		word(c.expect)
		word(0)
		switch {
		case c.onZero == nil:
			word(0)
		case c.onZero.at < 0:
			return nil, errors.New("build script: a label has no place")
		default:
			word(record(c.onZero.at))
		}
	}
	return out, nil
}

// callAt returns the call whose record is at addr.
func (s *Script) callAt(addr uint64) *Call {
	i := (addr - uint64(buffer+headerSize+len(s.data))) / recordSize
	if i >= uint64(len(s.calls)) {
		return nil
	}
	return s.calls[i]
}
