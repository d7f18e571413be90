package nodeengine

import (
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/engine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// Reporter returns what an engine.Node is to call for each step (OnStep), so that steps
// learns of it.
func Reporter(steps *agent.Steps) func(engine.StepReport) {
	return func(r engine.StepReport) {
		if r.Result == nil {
			return
		}
		steps.Report(agent.Domain{Tenant: r.Domain.Tenant, Sandbox: r.Domain.Sandbox}, r.Vertex.String(), Usage(r.Result))
	}
}

// Usage returns what a step used in the terms of the API.
func Usage(res *sandbox.Result) *agentv1.StepUsage {
	u := res.Usage
	out := &agentv1.StepUsage{
		Cpu: durationpb.New(u.CPU), PeakMemoryBytes: u.PeakMemory, DiskBytes: u.DiskBytes, Inodes: u.Inodes,
		IoReadBytes: u.IORead, IoWriteBytes: u.IOWrite, LogBytes: u.LogBytes,
	}
	if u.ThrottledTime > 0 {
		out.Throttled = durationpb.New(u.ThrottledTime)
	}
	for _, l := range res.Reached {
		out.LimitsReached = append(out.LimitsReached, string(l))
	}
	out.Network = network(res.Network)
	return out
}
