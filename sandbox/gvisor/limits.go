package gvisor

import (
	"errors"
	"path"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
)

// cgroupOf returns the name of the cgroup of a sandbox, which has the processes of the
// sandbox and its file server.
func (r *Runtime) cgroupOf(box string) string { return path.Join("/", r.cfg.CgroupParent, box) }

// removeCgroup removes the cgroup of a sandbox that has ended.
func (b *box) removeCgroup() error {
	b.cgroup.Close()
	return b.r.cgroups.Remove(b.r.cgroupOf(b.id))
}

// limit holds the sandbox to the limits of its step, before it sees anything of it.
func (s *stepRun) limit() error { return s.box.cgroup.Limit(s.step.Limits) }

// account completes the result of a step whose process has ended.
func (s *stepRun) account(res *sandbox.Result) error { return s.box.cgroup.Account(res) }

// endedByLimit returns the result of a step that could not be run or collected because
// a limit was reached. The kernel chooses what it kills or does not start. If that was
// a process of the sandbox itself, the step ends with the sandbox, and what it wrote is
// lost.
func (s *stepRun) endedByLimit(err error) (*sandbox.Result, bool) {
	res := &sandbox.Result{ExitCode: 128 + int(unix.SIGKILL)}
	if errors.Is(err, cgroup.ErrInUse) {
		res.Reach(sandbox.LimitMemory)
	}
	if s.account(res) != nil || len(res.Reached) == 0 {
		return nil, false
	}
	return res, true
}
