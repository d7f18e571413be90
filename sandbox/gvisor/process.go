package gvisor

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

func netNameservers(n sandbox.Network) []netip.Addr {
	if n == nil {
		return nil
	}
	return n.Nameservers()
}

// spawner starts processes from one thread that lives as long as the program:
// a parent-death signal goes off when the starting thread ends, not the process.
var spawner = sync.OnceValue(func() chan func() {
	calls := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range calls {
			f()
		}
	}()
	return calls
})

func startLocked(cmd *exec.Cmd) error {
	done := make(chan error, 1)
	spawner() <- func() { done <- cmd.Start() }
	return <-done
}

// stdio connects a process's standard streams with the caller's.
type stdio struct {
	// guest are the process's ends, in the order of its descriptors.
	guest []*os.File
	// host are our ends.
	host     []*os.File
	terminal *os.File
	copiers  sync.WaitGroup
	stdin    io.Closer
}

func newStdio(p *sandbox.Process) (_ *stdio, err error) {
	s := &stdio{stdin: p.Stdin}
	defer func() {
		if err != nil {
			s.closeGuest()
			s.finish()
		}
	}()
	if p.Terminal {
		return s, s.openTerminal(p)
	}
	if err := s.connectStdin(p); err != nil {
		return s, err
	}
	for i, w := range []io.Writer{p.Stdout, p.Stderr} {
		if i == 1 && w != nil && sameWriter(p.Stdout, p.Stderr) {
			// One writer is never called from two goroutines.
			s.guest = append(s.guest, s.guest[1])
			continue
		}
		if w == nil {
			null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			if err != nil {
				return s, err
			}
			s.guest = append(s.guest, null)
			continue
		}
		ours, theirs, err := os.Pipe()
		if err != nil {
			return s, err
		}
		s.guest, s.host = append(s.guest, theirs), append(s.host, ours)
		s.copiers.Go(func() {
			if _, err := io.Copy(w, ours); err != nil {
				// The process must not wait for a reader that is gone.
				ours.Close()
			}
		})
	}
	return s, nil
}

func sameWriter(a, b io.Writer) bool {
	defer func() { _ = recover() }() // types that cannot be compared differ
	return a == b
}

func (s *stdio) connectStdin(p *sandbox.Process) error {
	if p.Stdin == nil {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return err
		}
		s.guest = append(s.guest, null)
		return nil
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	s.guest, s.host = append(s.guest, theirs), append(s.host, ours)
	// This ends with the input, or with the process, which closes the input.
	go func() {
		_, _ = io.Copy(ours, p.Stdin)
		ours.Close()
	}()
	return nil
}

// openTerminal makes a pseudo-terminal of the node.
func (s *stdio) openTerminal(p *sandbox.Process) error {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open a terminal: %w", err)
	}
	s.host, s.terminal = append(s.host, master), master
	var slave int
	err = s.onTerminal(func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		var errno unix.Errno
		var r uintptr
		r, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
		if errno != 0 {
			return errno
		}
		slave = int(r)
		return nil
	})
	if err != nil {
		return fmt.Errorf("open a terminal: %w", err)
	}
	f := os.NewFile(uintptr(slave), "terminal")
	s.guest = append(s.guest, f, f, f)
	if p.Stdout != nil {
		s.copiers.Go(func() { _, _ = io.Copy(p.Stdout, master) })
	}
	if p.Stdin != nil {
		go func() { _, _ = io.Copy(master, p.Stdin) }()
	}
	return nil
}

func (s *stdio) onTerminal(f func(fd int) error) error {
	conn, err := s.terminal.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := conn.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

func (s *stdio) closeGuest() {
	for _, f := range s.guest {
		f.Close()
	}
}

// finish waits until all output has been passed on. Call it when the process is
// gone; what it left running may hold its streams, and is given up on.
func (s *stdio) finish() {
	if s.stdin != nil {
		s.stdin.Close()
		s.stdin = nil
	}
	done := make(chan struct{})
	go func() { s.copiers.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(200 * time.Millisecond):
		for _, f := range s.host {
			_ = f.SetReadDeadline(time.Unix(1, 0))
		}
		<-done
	}
	for _, f := range s.host {
		f.Close()
	}
	s.host = nil
}

// runProcess starts the step's container, whose first process is the step's, and
// waits until that ends.
func (s *stepRun) runProcess(ctx context.Context, started func()) (*sandbox.Result, error) {
	ended := make(chan struct{})
	defer close(ended)
	run := &running{ctl: s.box.ctl, container: s.container, rootfs: s.rootfs, noNewPrivs: s.noNewPrivs, ended: ended}
	return run.process(ctx, &s.step.Process, s.startContainer, func(io *stdio) {
		s.copies = io
		s.r.set(s.step.ID, run)
		if started != nil {
			started()
		}
	})
}

// startContainer starts the step's container with the given streams. Its first
// process is named by 0.
func (s *stepRun) startContainer(ctx context.Context, guest []*os.File) (int32, error) {
	args := startArgs{Spec: s.spec, CID: s.container, GoferMountConfs: s.confs}
	files := append([]*os.File{}, guest...)
	if s.step.Process.Terminal {
		files = files[:1]
	}
	if s.store != nil {
		args.NumGoferFilestoreFDs = 1
		files = append(files, s.store)
	}
	files = append(files, s.conns...)
	if len(files) > maxCallFiles {
		return 0, fmt.Errorf("a step can have no more than %d mounts", maxCallFiles-8)
	}
	return 0, s.box.ctl.call(ctx, methodStart, args, files, nil)
}

// Exec implements sandbox.Runtime.
func (r *Runtime) Exec(ctx context.Context, stepID string, p sandbox.Process) (*sandbox.Result, error) {
	run := r.lookup(stepID)
	if run == nil {
		return nil, sandbox.ErrNotRunning
	}
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("gvisor: process: %w", err)
	}
	ids, err := sandbox.ResolveUser(run.rootfs, p.User)
	if err != nil {
		return nil, fmt.Errorf("gvisor: %w", err)
	}
	var streams *stdio
	start := func(ctx context.Context, guest []*os.File) (int32, error) { return run.exec(ctx, &p, ids, guest) }
	res, err := run.process(ctx, &p, start, func(s *stdio) { streams = s })
	if streams != nil {
		streams.finish()
	}
	if err != nil {
		select {
		case <-run.ended:
			if ctx.Err() == nil {
				return nil, sandbox.ErrNotRunning
			}
		default:
		}
		return nil, fmt.Errorf("gvisor: run a process in step %s: %w", stepID, err)
	}
	return res, nil
}

// exec starts another process in the step's container and returns its ID.
func (r *running) exec(ctx context.Context, p *sandbox.Process, ids sandbox.UserIDs, guest []*os.File) (int32, error) {
	caps, err := capabilities(sandbox.ProcessSpec(*p, ids, r.noNewPrivs).Capabilities)
	if err != nil {
		return 0, err
	}
	args := execArgs{
		Argv: p.Args, Envv: p.Env, WorkingDirectory: p.Cwd,
		KUID: ids.UID, KGID: ids.GID, ExtraKGIDs: ids.Groups,
		NoNewPrivileges: r.noNewPrivs, Capabilities: caps, StdioIsPty: p.Terminal,
		GuestFDs: []int{0, 1, 2}, ContainerID: r.container,
	}
	var pid int32
	err = r.ctl.call(ctx, methodExec, args, guest, &pid)
	return pid, err
}

// process starts a process with start, calls started, and waits for its end. The
// caller of started finishes the streams.
func (r *running) process(ctx context.Context, p *sandbox.Process, start func(context.Context, []*os.File) (int32, error), started func(*stdio)) (*sandbox.Result, error) {
	streams, err := newStdio(p)
	if err != nil {
		return nil, fmt.Errorf("connect the process: %w", err)
	}
	pid, err := start(ctx, streams.guest)
	streams.closeGuest()
	if err != nil {
		streams.finish()
		return nil, fmt.Errorf("start %q: %w", p.Args[0], err)
	}
	started(streams)

	waitCtx, stop := context.WithCancel(ctx)
	var relay sync.WaitGroup
	relay.Go(func() { r.relay(waitCtx, p, pid, streams) })
	var status uint32
	if pid == 0 {
		err = r.ctl.call(ctx, methodWait, r.container, nil, &status)
	} else {
		err = r.ctl.call(ctx, methodWaitPID, waitArgs{PID: pid, CID: r.container}, nil, &status)
	}
	stop()
	relay.Wait()
	if err != nil {
		if ctx.Err() != nil && pid != 0 {
			// A process of Exec ends with its context; that of a step with its
			// sandbox.
			killCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			_ = r.ctl.call(killCtx, methodSignal, signalArgs{CID: r.container, Signo: int32(unix.SIGKILL), PID: pid}, nil, nil)
		}
		return nil, err
	}
	return &sandbox.Result{ExitCode: exitCode(unix.WaitStatus(status))}, nil
}

func exitCode(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// relay passes signals and terminal sizes on until ctx ends.
func (r *running) relay(ctx context.Context, p *sandbox.Process, pid int32, streams *stdio) {
	signals, sizes := p.Signal, p.Resize
	for {
		select {
		case <-ctx.Done():
			return
		case sig, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			r.signal(ctx, pid, sig, signalProcess)
		case size, ok := <-sizes:
			if !ok {
				sizes = nil
				continue
			}
			if streams.terminal == nil {
				continue
			}
			err := streams.onTerminal(func(fd int) error {
				return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
			})
			if err == nil {
				r.signal(ctx, pid, unix.SIGWINCH, signalForeground)
			}
		}
	}
}

// signal sends a signal; a process that has just ended is no error.
func (r *running) signal(ctx context.Context, pid int32, sig syscall.Signal, mode int) {
	_ = r.ctl.call(ctx, methodSignal, signalArgs{CID: r.container, Signo: int32(sig), PID: pid, Mode: mode}, nil, nil)
}
