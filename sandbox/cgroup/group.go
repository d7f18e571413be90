package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// Group is a control group in every hierarchy that limits need. Its methods may be
// called concurrently, except Close.
type Group struct {
	members []member
	// base is what Restart has Usage leave out, and peak a file that has the peak of
	// memory since then; nil: all do.
	base sandbox.Usage
	peak *os.File
}

// member is the part of a group that is in one hierarchy.
type member struct {
	dir *os.File
	*hierarchy
}

func (m member) file(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/self/fd/%d", m.dir.Fd()), name)
}

// Close lets go of the group. It stays as it is.
func (g *Group) Close() {
	for _, m := range g.members {
		m.dir.Close()
	}
	g.members = nil
	if g.peak != nil {
		g.peak.Close()
		g.peak = nil
	}
}

// Unified returns the directory of the group in the unified hierarchy, which belongs
// to g, or nil. A process can be born into it.
func (g *Group) Unified() *os.File {
	for _, m := range g.members {
		if m.unified {
			return m.dir
		}
	}
	return nil
}

// with returns the part that has a controller.
func (g *Group) with(controller string) (member, bool) {
	for _, m := range g.members {
		if slices.Contains(m.controllers, controller) {
			return m, true
		}
	}
	return member{}, false
}

// Doors opens the files through which a thread with no others in its process enters
// the group by writing "0" to each. Who was born into Unified is in the rest then. It
// is far faster than Add. The caller closes them.
func (g *Group) Doors() (doors []*os.File, err error) {
	for _, m := range g.members {
		if m.unified {
			continue
		}
		f, err := os.OpenFile(m.file("tasks"), os.O_WRONLY, 0)
		if err != nil {
			for _, f := range doors {
				f.Close()
			}
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		doors = append(doors, f)
	}
	return doors, nil
}

// Entrances returns the names of the files, as other processes of root see them, that
// a process writes "0" to so that it, and what it starts, is in the group in the
// hierarchies that have limits; and those to write to so that it is where this process
// is again.
func (g *Group) Entrances() (in, out []string, err error) {
	homes, err := homes()
	if err != nil {
		return nil, nil, err
	}
	const procs = "cgroup.procs"
	for _, m := range g.members {
		if len(m.controllers) == 0 {
			continue
		}
		in = append(in, fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), m.dir.Fd(), procs))
		out = append(out, filepath.Join(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), m.mount.Fd()), path.Join("/", homes[m.key()]), procs))
	}
	return in, out, nil
}

// homes returns the cgroups of this process, by hierarchy.
func homes() (map[string]string, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find own cgroups: %w", err)
	}
	out := map[string]string{}
	for _, h := range parse(string(data)) {
		out[h.key()] = h.home
	}
	return out, nil
}

// Processes returns the IDs of the group's processes that this process can see.
func (g *Group) Processes() (pids []int, err error) {
	if len(g.members) == 0 {
		return nil, os.ErrClosed
	}
	data, err := os.ReadFile(g.members[0].file("cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("list processes of a step: %w", err)
	}
	for _, line := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Add moves a process with all its threads into the group. What it uses already stays
// where it is counted.
func (g *Group) Add(pid int) error {
	for _, m := range g.members {
		if err := os.WriteFile(m.file("cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("move process into cgroup: %w", err)
		}
	}
	return nil
}

// MissingError says that the node cannot enforce a limit.
type MissingError struct {
	// Controller is the one that is missing.
	Controller string
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("the node has no cgroup controller %q that limits could be set with: enable it in the kernel, and let the agent manage cgroups (a privileged container)", e.Controller)
}

// ErrInUse is returned by Limit when the group's processes use more memory than they
// are to be limited to.
var ErrInUse = errors.New("the sandbox itself needs more memory than the limit")

// period is the time in which a CPU limit holds, in microseconds.
const period = 100_000

const (
	// defaultShares and defaultWeight are what the kernel gives a new group, minShares the
	// least that it takes.
	defaultShares, minShares = 1024, 2
	defaultWeight            = 100
	// minQuota is the least that the kernel takes for a period.
	minQuota = 1000
	// maxMillis and maxPIDs are more than any machine has; the kernel does not take
	// much more.
	maxMillis = 1000 << 16
	maxPIDs   = 4 << 20
)

// Limit sets limits. Those that l does not have stay as they are: no limit for a new
// group.
func (g *Group) Limit(l sandbox.Limits) error {
	if l.CPUMillis > 0 {
		quota := max(min(l.CPUMillis, maxMillis)*period/1000, minQuota)
		// Who may use a part of the processors has that part of the weight of who may use
		// all. A limit alone lets a step use up its time at once, beside a step that waits.
		all := 1000 * int64(runtime.NumCPU())
		part := min(l.CPUMillis, all)
		err := g.set("cpu",
			[]setting{
				{name: "cpu.cfs_period_us", value: period}, {name: "cpu.cfs_quota_us", value: quota},
				{name: "cpu.shares", value: max(defaultShares*part/all, minShares)},
			},
			[]setting{{name: "cpu.max", text: fmt.Sprintf("%d %d", quota, period)}, {name: "cpu.weight", value: max(defaultWeight*part/all, 1)}})
		if err != nil {
			return err
		}
	}
	if l.MemoryBytes > 0 {
		err := g.set("memory",
			[]setting{{name: "memory.limit_in_bytes", value: l.MemoryBytes}, {name: "memory.memsw.limit_in_bytes", value: l.MemoryBytes, optional: true}},
			[]setting{{name: "memory.swap.max", text: "0", optional: true}, {name: "memory.max", value: l.MemoryBytes}})
		if errors.Is(err, unix.EBUSY) {
			return ErrInUse
		}
		if err != nil {
			return err
		}
	}
	if l.PIDs > 0 {
		s := []setting{{name: "pids.max", value: min(l.PIDs, maxPIDs)}}
		return g.set("pids", s, s)
	}
	return nil
}

// setting is a value for a file of a group.
type setting struct {
	name  string
	value int64
	text  string // instead of value
	// optional is set for a file that some kernels do not have.
	optional bool
}

// set writes settings of a controller, in the terms of the version that it is in.
func (g *Group) set(controller string, v1, v2 []setting) error {
	m, ok := g.with(controller)
	if !ok {
		return &MissingError{Controller: controller}
	}
	settings := v1
	if m.unified {
		settings = v2
	}
	for _, s := range settings {
		if s.text == "" {
			s.text = strconv.FormatInt(s.value, 10)
		}
		err := m.write(s.name, s.text)
		if err != nil && !(s.optional && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("set limit %s of a step: %w", s.name, err)
		}
	}
	return nil
}

// write writes to a file that exists.
func (m member) write(name, text string) error {
	fd, err := unix.Openat(int(m.dir.Fd()), name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte(text))
	return errors.Join(err, unix.Close(fd))
}

// read reads a file, of which the first page is enough.
func (m member) read(name string) (string, error) {
	fd, err := unix.Openat(int(m.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	return string(buf[:max(n, 0)]), errors.Join(err, unix.Close(fd))
}
