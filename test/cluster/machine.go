package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// controlName is the name of the machine of the control plane.
const controlName = "control"

// Machine is the control plane or a node. It may be used by several goroutines.
type Machine struct {
	cluster *Cluster
	name    string
	address netip.Addr
	holder  process
}

// Name returns the machine's host name, which is a node's name in Kubernetes.
func (m *Machine) Name() string { return m.name }

// Address returns the machine's address in the network of machines.
func (m *Machine) Address() netip.Addr { return m.address }

// PID returns the process that holds the machine's namespaces, as the caller
// numbers it: /proc/PID/ns has them.
func (m *Machine) PID() int { return m.holder.PID }

// Path returns a path by which the caller reaches what the machine sees as path,
// with everything that is mounted there. It is for reading files and for sockets.
func (m *Machine) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(m.holder.PID), "root", path)
}

// ContainerdSocket returns the path by which the caller reaches a node's
// containerd. On the node, and in a Pod with that host path, it is
// /run/containerd/containerd.sock.
func (m *Machine) ContainerdSocket() string { return m.Path("/run/containerd/containerd.sock") }

// Command returns a command that runs inside the machine, in its root directory.
// When ctx ends, the program that entered the machine is killed; what it started
// there ends with the machine at the latest.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(m.holder.PID), "--mount", "--uts", "--net", "--pid", "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Env = m.environment()
	return cmd
}

// environment is what components and commands get, and nothing of the caller's.
func (m *Machine) environment() []string {
	tmp := filepath.Join(m.cluster.dir, "tmp")
	if m.name != controlName {
		tmp = nodeConfig + "/tmp"
	}
	return []string{
		"PATH=" + m.cluster.bin + ":/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root",
		"LANG=C.UTF-8",
		"TMPDIR=" + tmp,
	}
}

// view is one directory of the state directory that a machine sees elsewhere.
type view struct{ source, target string }

// views are a node's own directories, by their path below the node's directory.
// /var/lib is the last, for it may hide the state directory itself.
var views = []view{{"run", "/run"}, {"log", "/var/log"}, {"lib", "/var/lib"}}

// tunables are the kernel settings that kubelet wants, and would write for the
// whole machine. A node sees them as files that say what kubelet expects.
var tunables = map[string]string{
	"vm/overcommit_memory":     "1",
	"vm/panic_on_oom":          "0",
	"kernel/panic":             "10",
	"kernel/panic_on_oops":     "1",
	"kernel/keys/root_maxkeys": "1000000",
	// Bytes: 25 for each key.
	"kernel/keys/root_maxbytes": "25000000",
}

// holdScript makes the machine and becomes its process 1. Its arguments are the
// cgroup.procs file, the host name, and pairs of a source and a target to bind.
// Ignoring SIGCHLD makes the kernel reap what is orphaned in the machine. The
// second proc is there because the kernel lets a user namespace mount proc only
// where it could already see one with nothing mounted over parts of it.
const holdScript = `set -eu
echo 0 >"$1"; hostname "$2"; shift 2
mount --make-rprivate /
mount -t proc proc /proc
echo 1 >/proc/sys/net/ipv4/ip_forward
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
if [ -d /run/kiln-cluster/proc ]; then mount -t proc proc /run/kiln-cluster/proc; fi
mount --make-rshared /
echo ready
exec env --ignore-signal=CHLD sleep infinity <&- >&- 2>&-
`

// hold starts a machine. A node's directory must exist.
func (c *Cluster) hold(ctx context.Context, name string) (process, error) {
	args := []string{"-c", holdScript, "hold", c.group.procs(), name}
	if name != controlName {
		binds, err := prepareViews(c.nodeDir(name))
		if err != nil {
			return process{}, err
		}
		for _, b := range binds {
			args = append(args, b.source, b.target)
		}
	}
	cmd := exec.Command("/bin/sh", args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS,
	}
	var stderr strings.Builder
	r, w, err := os.Pipe()
	if err != nil {
		return process{}, fmt.Errorf("start machine %s: %w", name, err)
	}
	defer r.Close()
	cmd.Stdout = w
	cmd.Stderr = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return process{}, fmt.Errorf("start machine %s: %w", name, err)
	}
	c.reap(cmd)
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	for lines := bufio.NewScanner(r); lines.Scan(); {
		if lines.Text() == "ready" {
			return findProcess(cmd.Process.Pid)
		}
		stderr.WriteString(lines.Text() + "\n")
	}
	return process{}, fmt.Errorf("start machine %s: %s", name, strings.TrimSpace(stderr.String()))
}

// reap waits for a child for as long as this process lives.
func (c *Cluster) reap(cmd *exec.Cmd) {
	c.children.Go(func() { _ = cmd.Wait() })
}

func (c *Cluster) nodeDir(name string) string { return filepath.Join(c.dir, "nodes", name) }

// prepareViews makes the directories that a node sees as its own, and says what
// to bind where, in order.
func prepareViews(dir string) ([]view, error) {
	var binds []view
	fake := filepath.Join(dir, "run", "kiln-cluster", "sysctl")
	for name, value := range tunables {
		path := filepath.Join(fake, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("prepare node: %w", err)
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o644); err != nil {
			return nil, fmt.Errorf("prepare node: %w", err)
		}
		binds = append(binds, view{path, filepath.Join("/proc/sys", name)})
	}
	for _, d := range []string{"run/lock", "run/kiln-cluster/proc", "log/pods", "log/containers", "lib/kubelet", "lib/containerd", "lib/kiln"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("prepare node: %w", err)
		}
	}
	for _, v := range views {
		binds = append(binds, view{filepath.Join(dir, v.source), v.target})
	}
	return binds, nil
}

// joinScript moves a component into the cluster's cgroup before it is itself.
const joinScript = `echo 0 >"$1" && shift && exec "$@"`

// start starts a program in the machine, with its output appended to a file.
func (m *Machine) start(log string, args []string) (process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return process{}, fmt.Errorf("open log: %w", err)
	}
	defer out.Close()
	c := m.cluster
	cmd := exec.Command("/bin/sh", append([]string{"-c", joinScript, "join", c.group.procs()}, args...)...)
	cmd.Dir = "/"
	cmd.Env = m.environment()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := m.enter(cmd.Start); err != nil {
		return process{}, err
	}
	p, err := findProcess(cmd.Process.Pid) // before it is reaped, which may be soon
	c.reap(cmd)
	return p, err
}

// enter calls f on a thread in the machine's namespaces: what f starts lives
// there. The thread is never used for anything else.
func (m *Machine) enter(f func() error) error {
	if !m.holder.alive() {
		return fmt.Errorf("enter machine %s: it does not run", m.name)
	}
	pidfd, err := unix.PidfdOpen(m.holder.PID, 0)
	if err != nil {
		return fmt.Errorf("enter machine %s: %w", m.name, err)
	}
	defer unix.Close(pidfd)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(pidfd, unix.CLONE_NEWNET|unix.CLONE_NEWUTS|unix.CLONE_NEWPID|unix.CLONE_NEWNS)
		}
		if err != nil {
			done <- fmt.Errorf("enter machine %s: %w", m.name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// checkHidden refuses a directory that a node would not see.
func checkHidden(dir string) error {
	for _, v := range views {
		if dir == v.target || strings.HasPrefix(dir, v.target+"/") {
			return errors.New("start cluster: nodes do not see " + dir + ": keep the programs outside " + v.target)
		}
	}
	return nil
}
