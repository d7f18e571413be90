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
// nil when its exit code is one of valid (only 0 when valid is nil). Package failure
// knows these texts.
func exitError(ctx context.Context, res *sandbox.Result, l sandbox.Limits, valid []int) error {
	if valid == nil {
		valid = []int{0}
	}
	if slices.Contains(valid, res.ExitCode) {
		return nil
	}
	exit := &gatewayapi.ExitError{ExitCode: uint32(res.ExitCode)}
	switch {
	case ctx.Err() != nil:
		exit.Err = context.Cause(ctx)
	case res.Has(sandbox.LimitMemory) && l.MemoryBytes > 0:
		exit.Err = fmt.Errorf("exit code: %d: out of memory: the limit of %s was reached", res.ExitCode, units.BytesSize(float64(l.MemoryBytes)))
	case res.Has(sandbox.LimitMemory):
		exit.Err = fmt.Errorf("exit code: %d: out of memory: the node has none left for the step", res.ExitCode)
	case res.Has(sandbox.LimitPIDs):
		exit.Err = fmt.Errorf("exit code: %d: the limit of %d processes and threads was reached", res.ExitCode, l.PIDs)
	}
	return exit
}
