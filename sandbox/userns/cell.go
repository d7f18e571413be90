package userns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/stepfs"
	"github.com/kiln-build/kiln/sandbox/userns/script"
)

// cell is a sandbox: a process in namespaces of its own, in a cgroup of its own and
// with IDs of its own, that waits for the step that it is for. It serves one step.
type cell struct {
	name string
	ids  *idRange
	// network is nil when the cell has its own namespace with nothing in it. It may be
	// inherited from the step before, with what that might reach.
	network     sandbox.Network
	inherited   bool
	nameservers []netip.Addr
	cgroup      *cgroup.Group

	*child // nil when it was not made
	conn   *script.Conn
	// userNS shifts IDs of mounts. mountNS keeps the cell's mounts until it is
	// closed, which takes them away.
	userNS, mountNS *os.File
}

// namespaces are those that a cell starts with. Two follow: its IPC namespace when it
// has IDs to own it with, and its cgroup namespace when it is in its cgroup.
const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS

// sandboxPrefix starts the names of the cgroups of cells.
const sandboxPrefix = "sandbox-"

// newCell makes a cell with a network of the given mode: inherited, which then is the cell's
// to release also when there is an error, or a new one if that is nil.
func (r *Runtime) newCell(ctx context.Context, mode sandbox.NetworkMode, inherited sandbox.Network) (_ *cell, err error) {
	r.mu.Lock()
	r.cells++
	c := &cell{name: fmt.Sprint(sandboxPrefix, r.cells), network: inherited, inherited: inherited != nil}
	r.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, r.discard(c))
		}
	}()
	if c.ids, err = r.ranges.acquire(); err != nil {
		return nil, err
	}
	if err := r.connectNetwork(ctx, c, mode); err != nil {
		return nil, err
	}
	if c.cgroup, err = r.cgroups.Make(r.cgroupOf(c)); err != nil {
		return nil, err
	}
	b := birth{flags: namespaces, cgroup: c.cgroup.Unified()}
	if c.network == nil {
		b.flags |= unix.CLONE_NEWNET
	} else {
		if b.net, err = os.Open(c.network.Path()); err != nil {
			return nil, fmt.Errorf("open network namespace: %w", err)
		}
		defer b.net.Close()
	}
	if c.child, c.conn, err = r.zygote.make(b); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, c.conn.Abort)
	defer stop()
	return c, r.furnish(c)
}

// restrict has the cell's network reach what p permits; nil: what it is made with. One that is
// inherited does: its step is the successor of one with the same policy.
func (c *cell) restrict(p *egress.Policy) error {
	if p == nil || c.network == nil || c.inherited {
		return nil
	}
	if err := c.network.Restrict(p); err != nil {
		return fmt.Errorf("restrict network: %w", err)
	}
	c.nameservers = c.network.Nameservers()
	return nil
}

// contacts adds to res what its step did with the network.
func (c *cell) contacts(res *sandbox.Result) (err error) {
	if c.network != nil {
		res.Network, err = c.network.Contacts()
	}
	return err
}

// connectNetwork gives the cell its network.
func (r *Runtime) connectNetwork(ctx context.Context, c *cell, mode sandbox.NetworkMode) (err error) {
	if r.cfg.Networks == nil {
		if mode != sandbox.NetworkNone {
			return fmt.Errorf("network %s is not set up on this node: use network %s", mode, sandbox.NetworkNone)
		}
		return nil
	}
	if !c.inherited {
		if c.network, err = r.cfg.Networks.Acquire(ctx, mode); err != nil {
			return fmt.Errorf("get network %s: %w", mode, err)
		}
	}
	c.nameservers = c.network.Nameservers()
	return nil
}

// furnish gives the process its IDs, and mounts what is the same for all steps.
func (r *Runtime) furnish(c *cell) (err error) {
	proc := fmt.Sprintf("/proc/%d", c.proc.Pid)
	for _, m := range []string{"uid_map", "gid_map"} {
		line := fmt.Sprintf("0 %d %d", c.ids.first, RangeSize)
		if err := os.WriteFile(filepath.Join(proc, m), []byte(line), 0); err != nil {
			return fmt.Errorf("map IDs: %w", err)
		}
	}
	if c.userNS, err = os.Open(filepath.Join(proc, "ns/user")); err != nil {
		return fmt.Errorf("open user namespace: %w", err)
	}
	if c.mountNS, err = os.Open(filepath.Join(proc, "ns/mnt")); err != nil {
		return fmt.Errorf("open mount namespace: %w", err)
	}
	// Only the owner of a network namespace may mount its sysfs, and that is the
	// node for those that it lends.
	sysfs, err := sysfsOf(filepath.Join(proc, "ns/net"))
	if err != nil {
		return err
	}
	defer unix.Close(sysfs)
	doors, err := c.cgroup.Doors()
	if err != nil {
		return err
	}
	defer closeAll(doors)
	if _, err := c.conn.Run(r.furniture(sysfs, doors, c.network == nil)); err != nil {
		return fmt.Errorf("set up sandbox: %w", err)
	}
	return nil
}

// furniture returns the script that sets up a cell.
func (r *Runtime) furniture(sysfs int, doors []*os.File, loopback bool) *script.Script {
	s := script.New()
	fds := s.Receive(append([]int{sysfs}, descriptors(doors)...)...)
	enterCgroup(s, fds[1:])
	become(s)
	s.For("end with the agent")
	s.Do(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, int(unix.SIGKILL), 0, 0, 0)
	s.For("make IPC and cgroup namespaces")
	s.Do(unix.SYS_UNSHARE, unix.CLONE_NEWIPC|unix.CLONE_NEWCGROUP)
	if loopback {
		loopbackUp(s)
	}
	s.For("mount /sys")
	s.Do(unix.SYS_MOVE_MOUNT, fds[0], "", unix.AT_FDCWD, rootSys, unix.MOVE_MOUNT_F_EMPTY_PATH)
	for _, m := range r.template.Mounts {
		if m.Destination != rootSys {
			mountOf(s, m)
		}
	}
	devices(s)
	for _, p := range r.template.Linux.ReadonlyPaths {
		s.For("make %s read-only", p)
		s.Do(unix.SYS_MOUNT, p, p, "", unix.MS_BIND|unix.MS_REC, 0).Expect(unix.ENOENT)
		s.Do(unix.SYS_MOUNT, "", p, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, 0).Expect(unix.ENOENT)
	}
	for _, p := range r.template.Linux.MaskedPaths {
		// It is a file, a directory or nothing.
		s.For("hide %s", p)
		s.Do(unix.SYS_MOUNT, path.Join(hostDev, "null"), p, "", unix.MS_BIND, 0).Expect(unix.ENOENT, unix.ENOTDIR)
		s.Do(unix.SYS_MOUNT, "tmpfs", p, "tmpfs", unix.MS_RDONLY, "nr_blocks=1,nr_inodes=1").Expect(unix.ENOENT, unix.ENOTDIR)
	}
	s.For("tidy up")
	s.Do(unix.SYS_UMASK, 0o022)
	s.Do(unix.SYS_CLOSE_RANGE, 4, ^uint32(0), 0)
	return s
}

// become makes the process root of its user namespace, and takes from it what it
// has of us.
func become(s *script.Script) {
	s.For("become root of the user namespace")
	s.Do(unix.SYS_SETRESGID, 0, 0, 0)
	s.Do(unix.SYS_SETRESUID, 0, 0, 0)
	s.Do(unix.SYS_SETGROUPS, 0, 0)
	s.For("hide memory")
	s.Do(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	s.For("start session")
	s.Do(unix.SYS_SETSID)
	s.For("join new session keyring")
	s.Do(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0).Expect(unix.ENOSYS)
}

// loopbackUp brings the loopback device up.
func loopbackUp(s *script.Script) {
	s.For("bring loopback up")
	fd := s.Do(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	ifreq := make([]byte, 40)
	copy(ifreq, "lo")
	ifreq[16] = unix.IFF_UP | unix.IFF_RUNNING
	s.Do(unix.SYS_IOCTL, fd, unix.SIOCSIFFLAGS, ifreq)
}

// mountFlags are the options of the mounts of a step that are flags.
var mountFlags = map[string]uint64{
	"nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC, "strictatime": unix.MS_STRICTATIME, "ro": unix.MS_RDONLY,
}

// mountOf mounts what the spec of a step says, on a new directory if need be.
func mountOf(s *script.Script, m specs.Mount) {
	flags, data := optionsOf(m)
	s.For("mount %s", m.Destination)
	s.Do(unix.SYS_MKDIRAT, unix.AT_FDCWD, m.Destination, 0o755).Expect(unix.EEXIST)
	s.Do(unix.SYS_MOUNT, m.Source, m.Destination, m.Type, flags, data)
}

func optionsOf(m specs.Mount) (flags uint64, data string) {
	var rest []string
	for _, o := range m.Options {
		if f, ok := mountFlags[o]; ok {
			flags |= f
		} else {
			rest = append(rest, o)
		}
	}
	return flags, strings.Join(rest, ",")
}

// devices fills /dev.
func devices(s *script.Script) {
	for _, d := range stepDevices {
		s.For("make device %s", d)
		to := path.Join(rootDev, d)
		s.Do(unix.SYS_CLOSE, s.Do(unix.SYS_OPENAT, unix.AT_FDCWD, to, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o666))
		s.Do(unix.SYS_MOUNT, path.Join(hostDev, d), to, "", unix.MS_BIND, 0)
	}
	for _, l := range [][2]string{
		{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"},
	} {
		s.For("make /dev/%s", l[1])
		s.Do(unix.SYS_SYMLINKAT, l[0], unix.AT_FDCWD, path.Join(rootDev, l[1]))
	}
}

// idMap returns the shift for mounts that the cell sees.
func (c *cell) idMap() *stepfs.IDMap {
	return &stepfs.IDMap{UserNS: int(c.userNS.Fd()), UID: c.ids.first, GID: c.ids.first}
}

// end kills everything in the cell, waits for it, and takes its mounts away. It may
// be called again.
func (c *cell) end() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
	if c.child != nil {
		c.kill()
	}
	if c.mountNS != nil {
		c.mountNS.Close()
		c.mountNS = nil
	}
	if c.userNS != nil {
		c.userNS.Close()
		c.userNS = nil
	}
}

// discard ends the cell and releases all that belongs to it.
func (r *Runtime) discard(c *cell) error {
	c.end()
	var errs []error
	if c.cgroup != nil {
		c.cgroup.Close()
		errs = append(errs, r.cgroups.Remove(r.cgroupOf(c)))
	}
	if c.network != nil {
		errs = append(errs, c.network.Release())
	}
	if c.ids != nil {
		errs = append(errs, r.ranges.release(c.ids))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("release sandbox: %w", err)
	}
	return nil
}
