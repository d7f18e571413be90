package userns

import (
	"context"
	"errors"
	"os"
	"path"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
	"github.com/kiln-build/kiln/sandbox/userns/script"
	"github.com/kiln-build/kiln/sandbox/watch"
)

// openCgroups opens the hierarchies that sandboxes need. Processes are born into the
// unified one.
func openCgroups() (*cgroup.Node, error) {
	n, err := cgroup.Open()
	if err != nil {
		return nil, err
	}
	if n.Unified() == nil {
		return nil, errors.Join(errors.New("the kernel has no unified cgroup hierarchy"), n.Close())
	}
	return n, nil
}

// cgroupOf returns the name of the cgroup of a cell.
func (r *Runtime) cgroupOf(c *cell) string { return path.Join(r.cgroupParent(), c.name) }

// enterCgroup adds to s what takes its process, which has one thread, into the cgroup
// that doors belong to.
func enterCgroup(s *script.Script, doors []script.FD) {
	s.For("enter cgroup")
	for _, d := range doors {
		s.Do(unix.SYS_WRITE, d, "0", 1)
	}
}

func descriptors(files []*os.File) []int {
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	return fds
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// tooSmall returns the result of a step whose sandbox alone needs more memory than the
// step may use, if err says that.
func tooSmall(err error) (*sandbox.Result, bool) {
	if errors.Is(err, cgroup.ErrInUse) {
		return &sandbox.Result{ExitCode: 128 + int(unix.SIGKILL), Reached: []sandbox.Limit{sandbox.LimitMemory}}, true
	}
	return nil, false
}

// watch starts to watch a step that is about to run in c.
func (r *Runtime) watch(ctx context.Context, c *cell, step *sandbox.Step) (context.Context, *watch.Watch, error) {
	return watch.Start(ctx, watch.Config{Limits: step.Limits, Step: step, Processes: c.cgroup.Processes})
}

// conclude completes the result of a step that has run in c, of which no process is
// left.
func conclude(res *sandbox.Result, c *cell, w *watch.Watch) error {
	w.Stop()
	if err := c.cgroup.Account(res); err != nil {
		return err
	}
	if used, ok := c.state.SysUsage().(*syscall.Rusage); ok {
		// Cgroups of version 1 do not count writes that pass through memory.
		res.Usage.IORead = max(res.Usage.IORead, blockSize*used.Inblock)
		res.Usage.IOWrite = max(res.Usage.IOWrite, blockSize*used.Oublock)
	}
	w.Account(res, sandbox.Usage{})
	return nil
}

// blockSize is the unit of I/O in a process's usage, in bytes.
const blockSize = 512
