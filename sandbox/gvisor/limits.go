package gvisor

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
	"github.com/kiln-build/kiln/sandbox/watch"
)

// cgroupOf returns the name of the cgroup of a sandbox, which has the processes of the
// sandbox.
func (r *Runtime) cgroupOf(box string) string { return path.Join("/", r.cfg.CgroupParent, box) }

// removeCgroup removes the cgroup of a sandbox that has ended.
func (b *box) removeCgroup() error {
	if b.cgroup == nil {
		return nil
	}
	b.cgroup.Close()
	return b.r.cgroups.Remove(b.r.cgroupOf(b.id))
}

// limit holds the sandbox to the limits of its step, before it sees anything of it.
func (s *stepRun) limit() error { return s.box.cgroup.Limit(s.step.Limits) }

// account adds to the result of a step what its cgroup tells.
func (s *stepRun) account(res *sandbox.Result) error { return s.box.cgroup.Account(res) }

// sizeOf returns the options of the file system that takes what a step writes to its
// root. The sandbox refuses more.
func sizeOf(l sandbox.Limits) string {
	const pageSize = 4096
	var opts []string
	if l.DiskBytes > 0 {
		opts = append(opts, strconv.FormatInt(l.DiskBytes/pageSize*pageSize, 10))
	} else if l.Inodes > 0 {
		opts = append(opts, "0") // no limit
	}
	if l.Inodes > 0 {
		opts = append(opts, fmt.Sprintf("nr_inodes=%d", l.Inodes))
	}
	return strings.Join(opts, ",")
}

// watch starts to watch the step, which is about to start. The sandbox itself limits
// what is written to an overlay.
func (s *stepRun) watch(ctx context.Context) (context.Context, *watch.Watch, error) {
	cfg := watch.Config{Limits: s.step.Limits, Step: s.step}
	if s.overlaid() {
		cfg.Elsewhere = s.stored
	}
	return watch.Start(ctx, cfg)
}

// stored returns what the step has in the file that backs its writes.
func (s *stepRun) stored() (u sandbox.Usage) {
	var st unix.Stat_t
	if f := s.store; f != nil && unix.Fstat(int(f.Fd()), &st) == nil {
		u.DiskBytes = st.Blocks * 512
	}
	return u
}

// conclude completes the result of a step that has ended, and of which nothing runs or
// counts any more.
func (s *stepRun) conclude(res *sandbox.Result, w *watch.Watch) error {
	w.Stop()
	if err := s.account(res); err != nil {
		return err
	}
	w.Account(res, s.wrote)
	return nil
}

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
