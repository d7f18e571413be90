// Package stepusage tells what a step used, and what its sandbox kept it from, in the terms
// of the API.
//
// It promises to be pure.
package stepusage

import (
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// Of returns what a step used in the terms of the API.
func Of(res *sandbox.Result) *agentv1.StepUsage {
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
