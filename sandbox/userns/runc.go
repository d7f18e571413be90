package userns

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// runc starts the runc program.
type runc struct {
	// exe is a sealed copy of the program in memory. A container cannot change
	// it, and as runc sees that, it does not copy itself for each container.
	exe  *os.File
	root string
	// cgroups is a mount of the cgroup hierarchy that runc uses.
	cgroups *os.File

	starts chan func()
	done   chan struct{}
}

// newRunc reads the program at path. root is where runc keeps its state.
func newRunc(path, root string) (_ *runc, err error) {
	if path, err = exec.LookPath(path); err != nil {
		return nil, fmt.Errorf("find runc: %w", err)
	}
	src, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open runc: %w", err)
	}
	defer src.Close()
	fd, err := unix.MemfdCreate("runc", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err != nil {
		return nil, fmt.Errorf("make sealed copy of runc: %w", err)
	}
	writable := os.NewFile(uintptr(fd), "runc")
	defer writable.Close()
	if _, err := io.Copy(writable, src); err != nil {
		return nil, fmt.Errorf("make sealed copy of runc: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(writable.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("seal copy of runc: %w", err)
	}
	// What is open for writing cannot be executed.
	exe, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", writable.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open sealed copy of runc: %w", err)
	}
	r := &runc{exe: exe, root: root, starts: make(chan func()), done: make(chan struct{})}
	if r.cgroups, err = cgroup2(); err != nil {
		exe.Close()
		return nil, err
	}
	entered := make(chan error)
	go r.starter(entered)
	if err := <-entered; err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// starter starts processes on one thread that lives as long as r. The kernel
// sends the signal for a parent's death when the thread ends that started the
// child, and other threads of a Go program may end at any time.
//
// The thread has a mount namespace of its own in which the unified hierarchy is
// all there is of cgroups. With that runc starts a step inside its cgroup. On a
// node with the older hierarchies it would move it into a dozen of them, which
// waits for all processors each time, a hundredth of a second in all.
func (r *runc) starter(entered chan<- error) {
	defer close(r.done)
	runtime.LockOSThread() // never unlocked: the thread ends here
	entered <- r.enter()
	for start := range r.starts {
		start()
	}
}

// enter gives the thread its mount namespace.
func (r *runc) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace for runc: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts of runc from the node: %w", err)
	}
	fs, err := cgroup2()
	if err != nil {
		return err
	}
	defer fs.Close()
	if err := unix.Unmount(cgroupRoot, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("hide cgroup hierarchies from runc: %w", err)
	}
	if err := unix.MoveMount(int(fs.Fd()), "", unix.AT_FDCWD, cgroupRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("show cgroups to runc: %w", err)
	}
	return nil
}

// cgroup2 returns a detached mount of the unified cgroup hierarchy.
func cgroup2() (*os.File, error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open cgroup file system: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("make cgroup file system: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount cgroup file system: %w", err)
	}
	return os.NewFile(uintptr(fd), "cgroup2"), nil
}

// cgroup returns the directory of a cgroup of runc.
func (r *runc) cgroup(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/self/fd/%d", r.cgroups.Fd()), name)
}

func (r *runc) close() {
	close(r.starts)
	<-r.done
	r.exe.Close()
	r.cgroups.Close()
}

func (r *runc) path() string { return fmt.Sprintf("/proc/self/fd/%d", r.exe.Fd()) }

// command returns a runc command that logs to logFile, which may be empty. Its
// process dies with ours.
func (r *runc) command(dir, logFile string, args ...string) *exec.Cmd {
	argv := []string{"runc", "--root", r.root, "--rootless=false"}
	if logFile != "" {
		argv = append(argv, "--log", logFile, "--log-format", "json")
	}
	return &exec.Cmd{
		Path: r.path(), Args: append(argv, args...), Dir: dir,
		// Nothing of the agent's environment reaches runc.
		Env:         []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "GOMAXPROCS=2"},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	}
}

// start is cmd.Start on the thread of r.
func (r *runc) start(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	r.starts <- func() { result <- cmd.Start() }
	return <-result
}

// executes reports whether the container has got to run its program: runc then
// has its state and no longer the fifo with which it held the program back.
func (r *runc) executes(id string) bool {
	var st unix.Stat_t
	return unix.Stat(filepath.Join(r.root, id, "state.json"), &st) == nil &&
		errors.Is(unix.Stat(filepath.Join(r.root, id, "exec.fifo"), &st), unix.ENOENT)
}

// delete removes the container, killing what runs in it. It is not an error when
// there is no such container.
func (r *runc) delete(ctx context.Context, id string) error {
	cmd := r.command("/", "", "delete", "--force", id)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := r.start(cmd); err != nil {
		return fmt.Errorf("start runc delete: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil && !strings.Contains(out.String(), "does not exist") {
		return fmt.Errorf("runc delete %s: %w: %s", id, err, strings.TrimSpace(out.String()))
	}
	return nil
}

// logError returns what runc wrote to its log about why it failed, if it did.
func logError(logFile string) error {
	f, err := os.Open(logFile)
	if err != nil {
		return nil
	}
	defer f.Close()
	var last error
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var entry struct{ Level, Msg string }
		if json.Unmarshal(lines.Bytes(), &entry) == nil && (entry.Level == "error" || entry.Level == "fatal") {
			last = errors.New(entry.Msg)
		}
	}
	return last
}
