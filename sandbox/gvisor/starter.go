package gvisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// starter is a process that starts one sandbox after another: runsc itself, with
// kiln's addition, which saves a process for every sandbox. It takes no part in
// what the sandboxes do. When it ends so do they.
type starter struct {
	cmd    *exec.Cmd
	conn   *net.UnixConn
	exited chan struct{}
	log    tail
	// answers is set when the process has answered once.
	answers atomic.Bool
}

// starters keeps as many of them as start sandboxes at the same time, which is at
// most one for each processor.
type starters struct {
	r     *Runtime
	slots chan struct{}

	mu   sync.Mutex // guards what follows
	idle []*starter
	all  []*starter
}

func newStarters(r *Runtime) *starters {
	return &starters{r: r, slots: make(chan struct{}, max(2, runtime.GOMAXPROCS(0)))}
}

// starterCommand is what runsc is called with to be a starter.
const starterCommand = "kiln-starter"

// startRequest and startReply are the messages of a starter.
type startRequest struct {
	Flags               []string
	ID, Bundle, Program string
	// Enter and Leave are files of cgroups that the process joins with what it
	// writes: those of the sandbox before it starts it, its own after that.
	Enter, Leave []string
}

type startReply struct{ Error string }

// start starts the sandbox in the bundle. The connection ends when the sandbox is
// gone; shutting our side down ends the sandbox.
func (s *starters) start(ctx context.Context, req startRequest) (*net.UnixConn, error) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	p, err := s.get()
	if err != nil {
		<-s.slots
		return nil, fmt.Errorf("start runsc: %w", err)
	}
	conn, err := p.request(req)
	if err != nil {
		s.put(p)
		return nil, err
	}
	// The process is busy until it has answered, also when nobody waits for that.
	answered := make(chan error, 1)
	go func() {
		answered <- p.answer(conn)
		s.put(p)
	}()
	select {
	case err = <-answered:
		if err == nil {
			return conn, nil
		}
		conn.Close()
	case <-ctx.Done():
		_ = conn.CloseWrite()
		// What it has made is gone when it says so, or when it is killed.
		patience := time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
		<-answered
		_, _ = io.Copy(io.Discard, conn)
		patience.Stop()
		conn.Close()
		err = context.Cause(ctx)
	}
	return nil, err
}

// get returns a process that nobody uses.
func (s *starters) get() (*starter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.idle) > 0 {
		p := s.idle[len(s.idle)-1]
		s.idle = s.idle[:len(s.idle)-1]
		select {
		case <-p.exited:
		default:
			return p, nil
		}
	}
	p, err := s.r.newStarter()
	if err == nil {
		s.all = append(s.all, p)
	}
	return p, err
}

func (s *starters) put(p *starter) {
	s.mu.Lock()
	s.idle = append(s.idle, p)
	s.mu.Unlock()
	<-s.slots
}

// kill ends the processes at once, and with them every sandbox that they started or
// are starting. Nobody may need one any more.
func (s *starters) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.all {
		_ = p.cmd.Process.Kill()
	}
}

// close ends the processes. No sandbox may be left.
func (s *starters) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, p := range s.all {
		p.conn.Close()
		select {
		case <-p.exited:
		case <-time.After(5 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.exited
		}
		if err := os.Remove(s.r.starterFile(p.cmd.Process.Pid)); err != nil {
			errs = append(errs, err)
		}
	}
	s.all, s.idle = nil, nil
	return errors.Join(errs...)
}

// starterFile tells New of the next process about a starter.
func (r *Runtime) starterFile(pid int) string {
	return filepath.Join(r.startersDir(), strconv.Itoa(pid))
}

func (r *Runtime) startersDir() string { return filepath.Join(r.cfg.StateDir, "starters") }

// newStarter starts a process.
func (r *Runtime) newStarter() (*starter, error) {
	ours, theirs, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	p := &starter{exited: make(chan struct{})}
	if p.conn, err = unixConn(ours); err != nil {
		return nil, err
	}
	// The directory is there for those who look for the process.
	p.cmd = exec.Command(r.runsc, starterCommand, r.stepsDir()+"/")
	p.cmd.Stderr = &p.log
	p.cmd.ExtraFiles = []*os.File{theirs}
	p.cmd.Env = environment(r.cfg.StateDir)
	p.cmd.WaitDelay = time.Second
	p.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	if err := startLocked(p.cmd); err != nil {
		p.conn.Close()
		return nil, err
	}
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait()
	}()
	return p, os.WriteFile(r.starterFile(p.cmd.Process.Pid), nil, 0o600)
}

// request sends a request and returns the connection that is answered on.
func (p *starter) request(req startRequest) (*net.UnixConn, error) {
	data, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	conn, err := unixConn(ours)
	if err != nil {
		return nil, err
	}
	if _, _, err := p.conn.WriteMsgUnix(data, unix.UnixRights(int(theirs.Fd())), nil); err != nil {
		conn.Close()
		return nil, p.explain(err)
	}
	return conn, nil
}

// answer reads the answer.
func (p *starter) answer(conn *net.UnixConn) error {
	line, err := bufio.NewReaderSize(conn, 4096).ReadBytes('\n')
	var reply startReply
	if err == nil {
		err = json.Unmarshal(line, &reply)
	}
	if err != nil {
		return p.explain(err)
	}
	p.answers.Store(true)
	if reply.Error != "" {
		return errors.New(reply.Error)
	}
	return nil
}

// explain adds what the process said before it ended. One that never answered is
// that of a runsc which does not know what it is asked for.
func (p *starter) explain(err error) error {
	select {
	case <-p.exited:
		err = fmt.Errorf("%w: %s", err, p.log.String())
		if !p.answers.Load() {
			return unavailable("kiln's addition to runsc ("+starterCommand+" in "+p.cmd.Path+")", fixAddition, err)
		}
		return fmt.Errorf("runsc: %w", err)
	case <-time.After(time.Second):
		return fmt.Errorf("runsc: %w", err)
	}
}

// socketPair returns the two ends of a connection.
func socketPair(kind int) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs"), nil
}

// unixConn turns a file into a connection.
func unixConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("%T is no unix socket", conn)
	}
	return u, nil
}
