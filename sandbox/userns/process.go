package userns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

const (
	// startGrace is how long a cancelled start may go on: a process that is up
	// can be killed cleanly, and a start takes a few hundredths of a second.
	startGrace = 400 * time.Millisecond
	// startPoll is how often a starting step is looked at.
	startPoll = 2 * time.Millisecond
	// outputGrace is how long output may be read after the process has ended.
	outputGrace = 5 * time.Second
)

// supervise runs one runc command that runs p in the foreground, and returns how
// p ended. dir is the step's directory; name tells the command's files in it
// from those of others. args are completed with the socket for the process. If
// up is not nil, started is called once as soon as up says that the process runs.
func (r *Runtime) supervise(ctx context.Context, dir, name string, p sandbox.Process, up func() bool, started func(), args ...string) (_ *sandbox.Result, err error) {
	sock, err := listen(dir, name+".sock")
	if err != nil {
		return nil, err
	}
	defer sock.Close()
	logFile := filepath.Join(dir, name+".log")
	cmd := r.runc.command(dir, logFile, append([]string{args[0], "--pidfd-socket", name + ".sock"}, args[1:]...)...)
	streams, err := connect(cmd, p)
	if err != nil {
		return nil, err
	}
	if err := r.runc.start(cmd); err != nil {
		return nil, errors.Join(fmt.Errorf("start runc: %w", err), streams.abort())
	}
	streams.run()

	pidfds := make(chan int, 1)
	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		if fd, err := receivePidfd(sock); err == nil {
			pidfds <- fd
		}
	}()
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()

	pidfd := -1
	defer func() {
		sock.Close()
		<-accepted
		select {
		case fd := <-pidfds:
			unix.Close(fd)
		default:
		}
		if pidfd >= 0 {
			unix.Close(pidfd)
		}
	}()
	var poll *time.Ticker
	var tick <-chan time.Time
	defer func() {
		if poll != nil {
			poll.Stop()
		}
	}()
	cancelled := ctx.Done()
	var giveUp <-chan time.Time
	var waitErr error
	for running := true; running; {
		select {
		case waitErr = <-exited:
			running = false
		case pidfd = <-pidfds:
			if ctx.Err() != nil {
				_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
			} else if up != nil {
				poll = time.NewTicker(startPoll)
				tick = poll.C
			}
		case <-tick:
			if up() {
				poll.Stop()
				tick = nil
				started()
			}
		case s := <-p.Signal:
			if pidfd >= 0 {
				_ = unix.PidfdSendSignal(pidfd, s, nil, 0)
			}
		case size := <-p.Resize:
			streams.resize(size)
			_ = cmd.Process.Signal(unix.SIGWINCH)
		case <-cancelled:
			cancelled = nil
			if pidfd >= 0 {
				_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
			}
			giveUp = time.After(startGrace)
		case <-giveUp:
			// Either it never started, or runc does not notice its end.
			giveUp = time.After(startGrace)
			_ = cmd.Process.Kill()
		}
	}
	if err := streams.finish(); err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("copy output: %w", err)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := logError(logFile); err != nil {
		return nil, fmt.Errorf("runc: %w", err)
	}
	if tick != nil {
		started() // it was over before it was seen
	}
	var exit *exec.ExitError
	switch {
	case waitErr == nil:
		return &sandbox.Result{}, nil
	case !errors.As(waitErr, &exit):
		return nil, fmt.Errorf("wait for runc: %w", waitErr)
	case !exit.Exited():
		return nil, fmt.Errorf("runc ended early: %w", waitErr)
	}
	return &sandbox.Result{ExitCode: exit.ExitCode()}, nil
}

// listen makes a socket in dir. Socket addresses are short, so that the directory
// is named by descriptor.
func listen(dir, name string) (*net.UnixListener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open step directory: %w", err)
	}
	defer d.Close()
	addr := net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name)}
	l, err := net.ListenUnix("unix", &addr)
	if err != nil {
		return nil, fmt.Errorf("make socket for the process: %w", err)
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// receivePidfd waits for the descriptor of the step's process.
func receivePidfd(l *net.UnixListener) (int, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return -1, err
	}
	defer conn.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, errors.Join(errors.New("no descriptor received"), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("no descriptor received"), err)
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}

// streams are the standard streams of a process.
type streams struct {
	p      sandbox.Process
	master console.Console
	slave  *os.File
	stdin  *os.File // our end of the pipe
	copies sync.WaitGroup
	input  chan struct{}
	outErr error
}

// connect gives cmd the streams of p.
func connect(cmd *exec.Cmd, p sandbox.Process) (*streams, error) {
	s := &streams{p: p}
	if p.Terminal {
		master, path, err := console.NewPty()
		if err != nil {
			return nil, fmt.Errorf("make terminal: %w", err)
		}
		slave, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			master.Close()
			return nil, fmt.Errorf("open terminal: %w", err)
		}
		s.master, s.slave = master, slave
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		return s, nil
	}
	cmd.Stdout, cmd.Stderr = p.Stdout, p.Stderr
	cmd.WaitDelay = outputGrace
	if p.Stdin != nil {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("make standard input: %w", err)
		}
		cmd.Stdin, s.slave, s.stdin = r, r, w
	}
	return s, nil
}

// run copies; call it when the process has started.
func (s *streams) run() {
	if s.slave != nil {
		s.slave.Close()
	}
	var in io.Writer
	switch {
	case s.master != nil:
		in = s.master
		s.copies.Add(1)
		go func() {
			defer s.copies.Done()
			out := s.p.Stdout
			if out == nil {
				out = io.Discard
			}
			// The read fails with EIO when the other side is closed.
			if _, err := io.Copy(out, s.master); err != nil && !errors.Is(err, unix.EIO) {
				s.outErr = err
			}
		}()
	case s.stdin != nil:
		in = s.stdin
	}
	if in == nil || s.p.Stdin == nil {
		return
	}
	s.input = make(chan struct{})
	go func() {
		defer close(s.input)
		_, _ = io.Copy(in, s.p.Stdin) // the process need not read it all
		if s.stdin != nil {
			s.stdin.Close()
		}
	}()
}

func (s *streams) resize(size sandbox.WindowSize) {
	if s.master != nil {
		_ = s.master.Resize(console.WinSize{Height: size.Rows, Width: size.Cols})
	}
}

// finish waits for the output, and ends the input.
func (s *streams) finish() error {
	s.copies.Wait()
	if s.master != nil {
		s.master.Close()
	}
	if s.p.Stdin == nil {
		return s.outErr
	}
	s.p.Stdin.Close()
	if s.stdin != nil {
		s.stdin.Close()
	}
	select {
	case <-s.input:
	case <-time.After(outputGrace): // its Read does not end on Close; not ours
	}
	return s.outErr
}

// abort releases everything when the process did not start.
func (s *streams) abort() error {
	if s.slave != nil {
		s.slave.Close()
	}
	if s.stdin != nil {
		s.stdin.Close()
	}
	if s.master != nil {
		s.master.Close()
	}
	if s.p.Stdin != nil {
		return s.p.Stdin.Close()
	}
	return nil
}
