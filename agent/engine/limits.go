package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/docker/go-units"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/sandbox"
)

// DefaultPIDs is how many processes and threads a step may have when NodeConfig.Limits
// does not say.
const DefaultPIDs = 32768

// defaultPeriod is the period of a CPU quota that comes without one, in microseconds.
const defaultPeriod = 100_000

// limitsOf returns the limits of a step that asks for r, which is no part of what the
// step is: its place in the cache is the same with all limits. most are the most that
// it gets. What r has of swap and of relative weights changes nothing, as steps have
// no swap and one weight.
func limitsOf(r *pb.LinuxResources, most sandbox.Limits) (sandbox.Limits, error) {
	if r.GetCpusetCpus() != "" || r.GetCpusetMems() != "" {
		return sandbox.Limits{}, errors.New("choice of processors is refused: the agent places steps")
	}
	if r.GetMemory() < 0 || r.GetCpuQuota() < 0 {
		return sandbox.Limits{}, errors.New("limit of a step is negative")
	}
	l := sandbox.Limits{MemoryBytes: r.GetMemory(), PIDs: DefaultPIDs}
	if q := r.GetCpuQuota(); q > 0 {
		period := r.GetCpuPeriod()
		if period == 0 {
			period = defaultPeriod
		}
		// Beyond this no machine has processors for it.
		l.CPUMillis = max(1, int64(float64(q)/float64(period)*1000))
	}
	l.CPUMillis = least(l.CPUMillis, most.CPUMillis)
	l.MemoryBytes = least(l.MemoryBytes, most.MemoryBytes)
	if most.PIDs > 0 {
		l.PIDs = most.PIDs
	}
	return l, nil
}

// least returns the lesser of two limits, of which 0 is none.
func least(a, b int64) int64 {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
}

// exitError turns the end of a process into the error that BuildKit's clients know, or
// nil when its exit code is one of valid (only 0 when valid is nil) and no limit has ended
// it. Package failure knows these texts.
func exitError(ctx context.Context, res *sandbox.Result, l sandbox.Limits, valid []int) error {
	if valid == nil {
		valid = []int{0}
	}
	if slices.Contains(valid, res.ExitCode) && res.EndedBy == "" {
		return nil
	}
	exit := &gatewayapi.ExitError{ExitCode: uint32(res.ExitCode)}
	switch {
	case ctx.Err() != nil:
		exit.Err = context.Cause(ctx)
	case res.EndedBy != "":
		exit.Err = reached(res, res.EndedBy, l)
	default:
		// Of several the one that most surely is why the process failed.
		for _, by := range []sandbox.Limit{sandbox.LimitMemory, sandbox.LimitDisk, sandbox.LimitInodes, sandbox.LimitPIDs} {
			if res.Has(by) {
				exit.Err = reached(res, by, l)
				break
			}
		}
	}
	return exit
}

// reached says that a step failed for a limit.
func reached(res *sandbox.Result, by sandbox.Limit, l sandbox.Limits) error {
	code := fmt.Sprintf("exit code: %d: ", res.ExitCode)
	switch {
	case by == sandbox.LimitMemory && l.MemoryBytes > 0:
		return fmt.Errorf("%sout of memory: the limit of %s was reached", code, units.BytesSize(float64(l.MemoryBytes)))
	case by == sandbox.LimitMemory:
		return fmt.Errorf("%sout of memory: the node has none left for the step", code)
	case by == sandbox.LimitPIDs:
		return fmt.Errorf("%sthe limit of %d processes and threads was reached", code, l.PIDs)
	case by == sandbox.LimitDisk:
		return fmt.Errorf("%sout of disk: the limit of %s was reached", code, units.BytesSize(float64(l.DiskBytes)))
	case by == sandbox.LimitInodes:
		return fmt.Errorf("%sout of disk: the limit of %d files was reached", code, l.Inodes)
	case by == sandbox.LimitTimeout:
		return fmt.Errorf("%stimed out: the limit of %s was reached", code, l.Timeout)
	}
	return fmt.Errorf("%sthe %s limit was reached", code, by)
}
