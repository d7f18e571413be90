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
	go r.starter()
	return r, nil
}

// starter starts processes on one thread that lives as long as r. The kernel
// sends the signal for a parent's death when the thread ends that started the
// child, and other threads of a Go program may end at any time.
func (r *runc) starter() {
	defer close(r.done)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for start := range r.starts {
		start()
	}
}

func (r *runc) close() {
	close(r.starts)
	<-r.done
	r.exe.Close()
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
		Env:         []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "GOMAXPROCS=2", "GOGC=off"},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	}
}

// start is cmd.Start on the thread of r.
func (r *runc) start(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	r.starts <- func() { result <- cmd.Start() }
	return <-result
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
