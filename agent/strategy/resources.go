package strategy

import (
	"math"

	"github.com/moby/buildkit/client/llb"

	"github.com/kiln-build/kiln/agent/steplimits"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// cpuPeriod is the period that a CPU limit is told in, in microseconds.
const cpuPeriod = 100_000

// cpuQuota returns the CPU time in a period of who may use millis thousandths of a
// processor.
func cpuQuota(millis int64) int64 {
	return min(millis, math.MaxInt64/cpuPeriod) * cpuPeriod / 1000
}

// stepResources limits a step. It is no part of what the step is: the cache knows the
// step with all limits.
func stepResources(r *agentv1.Resources) []llb.RunOption {
	var out []llb.RunOption
	l := llb.LinuxResources{Memory: r.GetMemoryBytes()}
	if n := r.GetCpuMillis(); n > 0 {
		l.CPUPeriod, l.CPUQuota = cpuPeriod, cpuQuota(n)
	}
	if l != (llb.LinuxResources{}) {
		out = append(out, llb.WithLinuxResources(l))
	}
	if text := steplimits.Encode(steplimits.Of(r)); text != "" {
		out = append(out, llb.WithDescription(map[string]string{steplimits.Key: text}))
	}
	return out
}
