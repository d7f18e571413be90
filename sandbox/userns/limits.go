package userns

import (
	"errors"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
	"github.com/kiln-build/kiln/sandbox/userns/script"
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
