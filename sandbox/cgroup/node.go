package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// controllers are those that limit and count what steps use. The last three only count:
// cpuacct is part of cpu in version 2, and blkio is called io there.
var controllers = []string{"cpu", "memory", "pids", "cpuacct", "blkio", "io"}

// Node is the cgroup hierarchies of the node. Its methods may be called concurrently.
type Node struct {
	hierarchies []*hierarchy
}

// hierarchy is a mounted hierarchy.
type hierarchy struct {
	mount *os.File
	// unified is set for that of version 2.
	unified bool
	// controllers are those of ours that it has. For the unified one it is what may
	// be enabled.
	controllers []string
	// home is the cgroup of the process that the hierarchy was read for.
	home string
}

// key tells hierarchies apart.
func (h *hierarchy) key() string {
	if h.unified {
		return ""
	}
	return strings.Join(h.controllers, ",")
}

// Open mounts the hierarchies that limits need. The unified one is among them when the
// kernel has it.
func Open() (_ *Node, err error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	n := &Node{}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	for _, h := range parse(string(data)) {
		if h.mount, err = h.open(); err != nil {
			return nil, err
		}
		n.hierarchies = append(n.hierarchies, h)
		if h.unified {
			offered, err := os.ReadFile(h.path("/", "cgroup.controllers"))
			if err != nil {
				return nil, fmt.Errorf("list cgroup controllers: %w", err)
			}
			h.controllers = ours(strings.Fields(string(offered)))
		}
	}
	return n, nil
}

// parse returns the hierarchies of a /proc/PID/cgroup that limits need, the unified one
// first.
func parse(text string) (out []*hierarchy) {
	for line := range strings.Lines(text) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		list, home, ok := strings.Cut(rest, ":")
		if !ok {
			continue
		}
		if list == "" {
			out = append([]*hierarchy{{unified: true, home: home}}, out...)
			continue
		}
		if all := strings.Split(list, ","); len(ours(all)) > 0 {
			// A hierarchy is mounted by the names of all its controllers.
			out = append(out, &hierarchy{controllers: all, home: home})
		}
	}
	return out
}

// ours returns those of names that limits need.
func ours(names []string) (out []string) {
	for _, name := range names {
		if slices.Contains(controllers, name) {
			out = append(out, name)
		}
	}
	return out
}

// open returns a detached mount of the hierarchy.
func (h *hierarchy) open() (*os.File, error) {
	kind := "cgroup"
	if h.unified {
		kind = "cgroup2"
	}
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open %s file system: %w", kind, err)
	}
	defer unix.Close(fs)
	for _, c := range h.controllers {
		if err := unix.FsconfigSetFlag(fs, c); err != nil {
			return nil, fmt.Errorf("choose cgroup controller %s: %w", c, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("make %s file system %s: %w", kind, strings.Join(h.controllers, ","), err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount %s file system: %w", kind, err)
	}
	return os.NewFile(uintptr(fd), kind), nil
}

// path returns the path of a file of a cgroup.
func (h *hierarchy) path(group, file string) string {
	return filepath.Join(fmt.Sprintf("/proc/self/fd/%d", h.mount.Fd()), path.Join("/", group), file)
}

// Close unmounts the hierarchies.
func (n *Node) Close() error {
	var errs []error
	for _, h := range n.hierarchies {
		errs = append(errs, h.mount.Close())
	}
	n.hierarchies = nil
	return errors.Join(errs...)
}

// Unified returns the mount of the unified hierarchy, which belongs to n, or nil.
func (n *Node) Unified() *os.File {
	for _, h := range n.hierarchies {
		if h.unified {
			return h.mount
		}
	}
	return nil
}

// Make makes the group called name, an absolute path, and those above it that are
// missing. Its last element must not exist. The caller closes the group, and removes
// it when its processes are gone.
func (n *Node) Make(name string) (_ *Group, err error) {
	g := &Group{}
	defer func() {
		if err != nil {
			g.Close()
			err = errors.Join(err, n.Remove(name))
		}
	}()
	for _, h := range n.hierarchies {
		// Another process may be removing an empty group above it.
		for range 100 {
			if err = h.make(name); !errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		if err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		dir, err := os.Open(h.path(name, ""))
		if err != nil {
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		m := member{dir: dir, hierarchy: h}
		g.members = append(g.members, m)
	}
	return g, nil
}

// make makes a group in one hierarchy.
func (h *hierarchy) make(name string) error {
	if err := os.MkdirAll(h.path(path.Dir(name), ""), 0o755); err != nil {
		return err
	}
	if err := h.enable(path.Dir(name)); err != nil {
		return err
	}
	return os.Mkdir(h.path(name, ""), 0o755)
}

// enable enables our controllers for the groups in group, and for all above it.
func (h *hierarchy) enable(group string) error {
	if !h.unified || len(h.controllers) == 0 {
		return nil
	}
	enabled, err := os.ReadFile(h.path(group, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	var missing []string
	for _, c := range h.controllers {
		if !slices.Contains(strings.Fields(string(enabled)), c) {
			missing = append(missing, "+"+c)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if group != "/" {
		if err := h.enable(path.Dir(group)); err != nil {
			return err
		}
	}
	write := func() error {
		return os.WriteFile(h.path(group, "cgroup.subtree_control"), []byte(strings.Join(missing, " ")), 0)
	}
	err = write()
	if errors.Is(err, unix.EBUSY) && group == "/" {
		// The agent is in the group itself, as in a container with a cgroup namespace.
		if err = h.vacate(); err == nil {
			err = write()
		}
	}
	if err != nil {
		return fmt.Errorf("enable controllers of %s: %w", group, err)
	}
	return nil
}

// leafGroup is where the processes of a root go that is to have groups with limits.
const leafGroup = "/kiln-agent"

// vacate moves all processes of the root into a group below it.
func (h *hierarchy) vacate() error {
	if err := os.Mkdir(h.path(leafGroup, ""), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	procs, err := os.ReadFile(h.path("/", "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range strings.Fields(string(procs)) {
		err := os.WriteFile(h.path(leafGroup, "cgroup.procs"), []byte(pid), 0)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %s: %w", pid, err)
		}
	}
	return nil
}

// patience is how long Remove waits for processes that are about to be gone. A killed
// sandbox with much memory on a busy node takes more than a second to go.
const patience = 15 * time.Second

// Remove removes the group called name, whose processes are gone or about to be. It
// waits for them up to 15 s. A group that does not exist is no error.
func (n *Node) Remove(name string) error {
	deadline := time.Now().Add(patience)
	var errs []error
	// The unified one is the last, so that who finds it there finds the others.
	for _, h := range slices.Backward(n.hierarchies) {
		errs = append(errs, h.remove(name, deadline))
	}
	return errors.Join(errs...)
}

func (h *hierarchy) remove(name string, deadline time.Time) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.Rmdir(h.path(name, ""))
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", name, err)
		}
		if time.Now().After(deadline) {
			procs, _ := os.ReadFile(h.path(name, "cgroup.procs")) // it only explains
			return fmt.Errorf("remove cgroup %s, which has processes %q: %w", name, strings.Fields(string(procs)), err)
		}
		time.Sleep(wait)
	}
}

// Tidy removes the group called name if it is empty and nothing uses it.
func (n *Node) Tidy(name string) {
	for _, h := range slices.Backward(n.hierarchies) {
		_ = unix.Rmdir(h.path(name, "")) // it is in use
	}
}
