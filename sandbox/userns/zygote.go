package userns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox/userns/script"
)

// Descriptors of the zygote, and those that a new process takes over from it.
const (
	fdNet    = 10 // the node's network namespace
	fdPID    = 11 // the node's PID namespace
	fdSocket = 20
	fdCgroup = 21
)

// Places in the root of the zygote, which a new sandbox starts with. The host's
// devices and its /proc are the only things of the node in it.
const (
	rootNew  = "/new"  // where the step's root is mounted
	rootProc = "/proc" // what is to become the step's /proc, /dev and /sys
	rootDev  = "/dev"
	rootSys  = "/sys"
	hostDev  = "/hostdev"
	hostProc = "/hostproc" // with it, the kernel lets a user namespace mount its own
)

// stepDevices are the devices of a step, none of which leads to the node.
var stepDevices = []string{"full", "null", "random", "tty", "urandom", "zero"}

// zygote makes the first processes of sandboxes.
//
// It is a process of a few pages: a new process is a copy of its parent, and a copy
// of this program's memory would be slow and would hold secrets. It runs scripts. The
// processes that it makes are children of this process, which waits for them, and
// run scripts too.
type zygote struct {
	program *os.File
	// room is a directory to mount on, in the zygote's own mount namespace.
	room string

	// starts are done by a thread that lives as long as this.
	starts chan func()
	ended  chan struct{}

	// mu guards what follows. A process that failed is replaced.
	mu   sync.Mutex
	conn *script.Conn
	cmd  *exec.Cmd
}

func newZygote(room string) (*zygote, error) {
	program, err := script.Program()
	if err != nil {
		return nil, err
	}
	z := &zygote{program: program, room: room, starts: make(chan func()), ended: make(chan struct{})}
	go z.starter()
	return z, nil
}

// starter starts processes on one thread. The kernel sends the signal for a parent's
// death when the thread ends that started the child, to it and to those that it makes
// for us. Other threads of a Go program may end at any time.
func (z *zygote) starter() {
	defer close(z.ended)
	runtime.LockOSThread() // never unlocked: the thread ends here
	for start := range z.starts {
		start()
	}
}

func (z *zygote) close() {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.end()
	close(z.starts)
	<-z.ended
	z.program.Close()
}

// end stops the process.
func (z *zygote) end() {
	if z.conn != nil {
		z.conn.Close()
		_ = z.cmd.Process.Kill()
		_ = z.cmd.Wait() // it was killed
		z.conn, z.cmd = nil, nil
	}
}

// birth says what a new process gets.
type birth struct {
	// flags are the namespaces to make.
	flags uint64
	// net is the network namespace, or nil for the node's or a new one.
	net *os.File
	// pid is a process whose PID namespace to be born in, or nil.
	pid *os.File
	// cgroup is the directory of its cgroup.
	cgroup *os.File
}

// child is a process that the zygote made for us.
type child struct {
	proc *os.Process
	// ended is closed when the process has ended, as state tells.
	ended chan struct{}
	state *os.ProcessState
	err   error
}

// alive tells whether the process has not ended yet.
func (c *child) alive() bool {
	select {
	case <-c.ended:
		return false
	default:
		return true
	}
}

// ending tells whether the process ends about now: something of it was gone already.
func (c *child) ending() bool {
	select {
	case <-c.ended:
		return true
	case <-time.After(endGrace):
		return false
	}
}

// endGrace is how long the end of a process that something is gone of is waited for.
const endGrace = 200 * time.Millisecond

// kill ends the process, and with it its PID namespace if it is the first one there.
func (c *child) kill() {
	_ = c.proc.Kill() // it may have ended
	<-c.ended
}

// make makes a process that runs scripts, and returns our end of its socket. A zygote
// that something has killed is replaced.
func (z *zygote) make(b birth) (*child, *script.Conn, error) {
	c, conn, err := z.tryMake(b)
	if errors.Is(err, script.ErrEnded) {
		c, conn, err = z.tryMake(b)
	}
	return c, conn, err
}

func (z *zygote) tryMake(b birth) (*child, *script.Conn, error) {
	conn, theirs, err := script.Pair()
	if err != nil {
		return nil, nil, err
	}
	s := b.script(theirs)
	z.mu.Lock()
	pid, err := z.run(s)
	z.mu.Unlock()
	theirs.Close() // so that the end of the process is seen
	if err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("make process: %w", err)
	}
	proc, err := os.FindProcess(int(pid))
	if err != nil {
		conn.Close() // which ends the process
		return nil, nil, fmt.Errorf("find new process: %w", err)
	}
	c := &child{proc: proc, ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		c.state, c.err = proc.Wait()
	}()
	if err := conn.Answer(s); err != nil {
		c.kill()
		conn.Close()
		return nil, nil, fmt.Errorf("make process: %w", err)
	}
	return c, conn, nil
}

// script returns the script that the zygote runs for b, the end of it in two
// processes.
func (b birth) script(socket *os.File) *script.Script {
	s := script.New()
	files := []*os.File{socket, b.cgroup}
	for _, f := range []*os.File{b.net, b.pid} {
		if f != nil {
			files = append(files, f)
		}
	}
	raw := make([]int, len(files))
	for i, f := range files {
		raw[i] = int(f.Fd())
	}
	fds := s.Receive(raw...)
	s.For("take over descriptors")
	s.Do(unix.SYS_DUP3, fds[0], fdSocket, unix.O_CLOEXEC)
	s.Do(unix.SYS_DUP3, fds[1], fdCgroup, unix.O_CLOEXEC)
	rest := fds[2:]
	if b.net != nil {
		s.For("enter network namespace")
		s.Do(unix.SYS_SETNS, rest[0], unix.CLONE_NEWNET)
		rest = rest[1:]
	}
	if b.pid != nil {
		s.For("enter PID namespace")
		s.Do(unix.SYS_SETNS, rest[0], unix.CLONE_NEWPID)
	}
	// struct clone_args; the process is our child, as the zygote is.
	const intoCgroup = 0x200000000
	args := s.Words(b.flags|unix.CLONE_PARENT|intoCgroup, 0, 0, 0, 0, 0, 0, 0, 0, 0, fdCgroup)
	child, end := s.Label(), s.Label()
	s.For("make process in its namespaces and cgroup")
	s.Result(s.Do(unix.SYS_CLONE3, args, 88).OnZero(child))
	s.For("go back to the node's namespaces")
	if b.net != nil {
		s.Do(unix.SYS_SETNS, fdNet, unix.CLONE_NEWNET)
	}
	if b.pid != nil {
		s.Do(unix.SYS_SETNS, fdPID, unix.CLONE_NEWPID)
	}
	s.Do(unix.SYS_CLOSE_RANGE, fdPID+1, ^uint32(0), 0)
	s.Do(unix.SYS_CLOSE_RANGE, 4, fdNet-1, 0).OnZero(end)
	s.Place(child)
	s.For("take over socket")
	s.Do(unix.SYS_DUP3, fdSocket, 3, unix.O_CLOEXEC)
	s.Do(unix.SYS_CLOSE_RANGE, 4, ^uint32(0), 0)
	s.Place(end)
	return s
}

// run runs s in the zygote, starting it if need be. The caller holds z.mu.
func (z *zygote) run(s *script.Script) (int64, error) {
	if z.conn == nil {
		if err := z.start(); err != nil {
			return 0, err
		}
	}
	result, err := z.conn.Run(s)
	if err != nil {
		z.end() // it may be anywhere now
	}
	return result, err
}

// start starts the process.
func (z *zygote) start() error {
	conn, theirs, err := script.Pair()
	if err != nil {
		return err
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		theirs.Close()
		conn.Close()
		return fmt.Errorf("start zygote: %w", err)
	}
	defer null.Close()
	cmd := &exec.Cmd{
		Path: "/proc/self/fd/4", Args: []string{"kiln-zygote"}, Env: []string{}, Dir: "/",
		Stdin: null, Stdout: null, Stderr: null, ExtraFiles: []*os.File{theirs, z.program},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	}
	started := make(chan error)
	z.starts <- func() { started <- cmd.Start() }
	err = <-started
	theirs.Close() // so that the end of the process is seen
	if err != nil {
		conn.Close()
		return fmt.Errorf("start zygote: %w", err)
	}
	z.conn, z.cmd = conn, cmd
	if err := z.setUp(); err != nil {
		z.end()
		return fmt.Errorf("start zygote: %w", err)
	}
	return nil
}

const (
	// sizeofSigaction and sizeofSigset are those of the kernel's structures.
	sizeofSigaction, sizeofSigset = 32, 8
	// lastStandardSignal is the first signal after those with names.
	lastStandardSignal = 32
)

// setUp gives the zygote a mount namespace with an almost empty root, read-only.
func (z *zygote) setUp() error {
	var own [2]int
	for i, name := range []string{"net", "pid"} {
		fd, err := unix.Open("/proc/self/ns/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open own %s namespace: %w", name, err)
		}
		defer unix.Close(fd)
		own[i] = fd
	}
	s := script.New()
	fds := s.Receive(own[:]...)
	s.For("keep namespaces of the node")
	s.Do(unix.SYS_DUP3, fds[0], fdNet, unix.O_CLOEXEC)
	s.Do(unix.SYS_DUP3, fds[1], fdPID, unix.O_CLOEXEC)
	s.Do(unix.SYS_CLOSE_RANGE, 4, fdNet-1, 0)
	s.Do(unix.SYS_FCNTL, 3, unix.F_SETFD, unix.FD_CLOEXEC)
	// A step starts with what every program may expect, whoever started kiln: nohup
	// ignores SIGHUP, a shell without job control SIGINT and SIGQUIT.
	s.For("take signals as they are by default")
	byDefault := make([]byte, sizeofSigaction)
	for sig := 1; sig < int(lastStandardSignal); sig++ {
		if sig != int(unix.SIGKILL) && sig != int(unix.SIGSTOP) {
			s.Do(unix.SYS_RT_SIGACTION, sig, byDefault, 0, sizeofSigset)
		}
	}
	s.For("make mount namespace")
	s.Do(unix.SYS_UNSHARE, unix.CLONE_NEWNS)
	s.Do(unix.SYS_MOUNT, "", "/", "", unix.MS_REC|unix.MS_PRIVATE, 0)
	s.For("mount root of sandboxes on %s", z.room)
	s.Do(unix.SYS_MOUNT, "kiln", z.room, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=1m")
	s.Do(unix.SYS_CHDIR, z.room)
	for _, dir := range []string{rootNew, rootProc, rootDev, rootSys, hostDev, hostProc} {
		s.Do(unix.SYS_MKDIRAT, unix.AT_FDCWD, dir[1:], 0o755)
	}
	for _, d := range stepDevices {
		s.For("show device %s", d)
		to := path.Join(hostDev, d)[1:]
		s.Do(unix.SYS_CLOSE, s.Do(unix.SYS_OPENAT, unix.AT_FDCWD, to, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o666))
		s.Do(unix.SYS_MOUNT, filepath.Join("/dev", d), to, "", unix.MS_BIND, 0)
	}
	s.For("mount /proc of the node")
	s.Do(unix.SYS_MOUNT, "proc", hostProc[1:], "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, 0)
	s.For("leave the node's root")
	s.Do(unix.SYS_PIVOT_ROOT, ".", ".")
	s.Do(unix.SYS_UMOUNT2, ".", unix.MNT_DETACH)
	s.Do(unix.SYS_CHDIR, "/")
	s.For("make root of sandboxes read-only")
	s.Do(unix.SYS_MOUNT, "", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, 0)
	_, err := z.conn.Run(s)
	if errors.Is(err, script.ErrEnded) {
		err = fmt.Errorf("%w: the node does not run programs from memory", err)
	}
	return err
}
