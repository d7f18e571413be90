package userns

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"sync"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/userns/script"
)

// outputGrace is how long output may be read after the process has ended.
const outputGrace = 5 * time.Second

// streams are the standard streams of a process: three pipes, or a terminal.
type streams struct {
	p sandbox.Process
	// ours and theirs are the ends of the pipes.
	ours   [3]*os.File
	theirs []*os.File
	master console.Console

	copies sync.WaitGroup
	input  chan struct{}
	mu     sync.Mutex // guards outErr
	outErr error
	done   bool
}

// connect makes the streams of p. The pipes belong to owner on the node.
func connect(p sandbox.Process, owner uint32) (_ *streams, err error) {
	s := &streams{p: p}
	if p.Terminal {
		return s, nil
	}
	defer func() {
		if err != nil {
			s.closePipes()
		}
	}()
	for i := range s.ours {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return nil, fmt.Errorf("make pipe: %w", err)
		}
		our, their := fds[0], fds[1]
		if i == 0 {
			our, their = their, our
		}
		s.theirs = append(s.theirs, os.NewFile(uintptr(their), "pipe"))
		err := errors.Join(setNonblock(our), unix.Fchown(their, int(owner), int(owner)))
		s.ours[i] = os.NewFile(uintptr(our), "pipe")
		if err != nil {
			return nil, fmt.Errorf("make pipe: %w", err)
		}
	}
	return s, nil
}

// setNonblock is for our ends of pipes, which the runtime then waits for without a
// thread.
func setNonblock(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("set pipe non-blocking: %w", err)
	}
	return nil
}

// fds returns what a process receives to have the streams.
func (s *streams) fds() []int {
	var fds []int
	for _, f := range s.theirs {
		fds = append(fds, int(f.Fd()))
	}
	return fds
}

// plug completes and runs a script that makes the streams those of its process. got
// are what it has received for fds. uid will be the process's user. console asks for
// a /dev/console.
func (s *streams) plug(conn *script.Conn, sc *script.Script, got []script.FD, uid uint32, consoleFile bool) error {
	defer s.closeTheirs()
	if !s.p.Terminal {
		sc.For("set standard streams")
		for i, fd := range got {
			sc.Do(unix.SYS_DUP3, fd, i, 0)
			sc.Do(unix.SYS_FCHOWN, i, uid, ^uint32(0))
		}
		sc.Do(unix.SYS_CLOSE_RANGE, 4, ^uint32(0), 0)
		_, err := conn.Run(sc)
		return err
	}
	terminal(sc, uid, consoleFile)
	f, err := conn.RunForFile(sc, "/dev/ptmx")
	if err != nil {
		return err
	}
	if s.master, err = console.ConsoleFromFile(f); err != nil {
		f.Close()
		return fmt.Errorf("use terminal: %w", err)
	}
	if err := console.ClearONLCR(f.Fd()); err != nil {
		return fmt.Errorf("set up terminal: %w", err)
	}
	return nil
}

// terminal adds to sc what makes a terminal of the sandbox the process's.
func terminal(sc *script.Script, uid uint32, consoleFile bool) {
	const fdMaster, fdSlave = 100, 101
	sc.For("open terminal")
	master := sc.Do(unix.SYS_OPENAT, unix.AT_FDCWD, "/dev/pts/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	sc.Do(unix.SYS_IOCTL, master, unix.TIOCSPTLCK, make([]byte, 8))
	slave := sc.Do(unix.SYS_IOCTL, master, unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY)
	sc.Do(unix.SYS_DUP3, slave, fdSlave, unix.O_CLOEXEC)
	if consoleFile {
		sc.For("mount /dev/console")
		sc.Do(unix.SYS_CLOSE, sc.Do(unix.SYS_OPENAT, unix.AT_FDCWD, "/dev/console", unix.O_CREAT|unix.O_NOFOLLOW|unix.O_WRONLY|unix.O_CLOEXEC, 0o600))
		tree := sc.Do(unix.SYS_OPEN_TREE, fdSlave, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
		sc.Do(unix.SYS_MOVE_MOUNT, tree, "", unix.AT_FDCWD, "/dev/console", unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	sc.For("set standard streams")
	for i := range 3 {
		sc.Do(unix.SYS_DUP3, fdSlave, i, 0)
	}
	sc.Do(unix.SYS_FCHOWN, 0, uid, ^uint32(0))
	sc.Do(unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	sc.For("hand over terminal")
	sc.Do(unix.SYS_DUP3, master, fdMaster, unix.O_CLOEXEC)
	sc.SendFile(fdMaster)
	sc.Do(unix.SYS_CLOSE_RANGE, 4, ^uint32(0), 0)
}

// run copies; call it when the process has started.
func (s *streams) run() {
	var in io.Writer = s.ours[0]
	if s.master != nil {
		in = s.master
		s.copyOut(s.p.Stdout, s.master)
	} else {
		out, errOut := s.p.Stdout, s.p.Stderr
		if same(out, errOut) {
			out = &locked{w: out}
			errOut = out
		}
		s.copyOut(out, s.ours[1])
		s.copyOut(errOut, s.ours[2])
	}
	if s.p.Stdin == nil {
		if s.master == nil {
			s.ours[0].Close()
		}
		return
	}
	s.input = make(chan struct{})
	go func() {
		defer close(s.input)
		_, _ = io.Copy(in, s.p.Stdin) // the process need not read it all
		if s.master == nil {
			s.ours[0].Close()
		}
	}()
}

func (s *streams) copyOut(to io.Writer, from io.Reader) {
	if to == nil {
		to = io.Discard
	}
	s.copies.Go(func() {
		// A terminal fails with EIO when the other side is closed.
		_, err := io.Copy(to, from)
		if err == nil || errors.Is(err, unix.EIO) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		s.mu.Lock()
		s.outErr = errors.Join(s.outErr, err)
		s.mu.Unlock()
		_, _ = io.Copy(io.Discard, from) // so that the process can go on
	})
}

func (s *streams) resize(size sandbox.WindowSize) {
	if s.master != nil {
		_ = s.master.Resize(console.WinSize{Height: size.Rows, Width: size.Cols})
	}
}

// finish waits for the output, and ends the input.
func (s *streams) finish() error {
	// Somebody else may have got hold of the other ends.
	grace := time.AfterFunc(outputGrace, func() {
		for _, f := range s.ours[1:] {
			if f != nil {
				_ = f.SetReadDeadline(time.Unix(1, 0))
			}
		}
	})
	s.copies.Wait()
	grace.Stop()
	_ = s.abort()
	if s.input != nil {
		select {
		case <-s.input:
		case <-time.After(outputGrace): // its Read does not end on Close; not ours
		}
	}
	return s.outErr
}

// abort releases everything. It may be called again.
func (s *streams) abort() error {
	if s.done {
		return nil
	}
	s.done = true
	s.closePipes()
	if s.master != nil {
		s.master.Close()
	}
	if s.p.Stdin != nil {
		_ = s.p.Stdin.Close() // its owner's error, not the step's
	}
	return nil
}

func (s *streams) closeTheirs() {
	for _, f := range s.theirs {
		f.Close()
	}
	s.theirs = nil
}

func (s *streams) closePipes() {
	s.closeTheirs()
	for _, f := range s.ours {
		if f != nil {
			f.Close()
		}
	}
}

// locked lets two streams write to one writer.
type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// same tells whether both are one writer.
func same(a, b io.Writer) bool {
	return a != nil && b != nil && reflect.TypeOf(a) == reflect.TypeOf(b) && reflect.TypeOf(a).Comparable() && a == b
}
