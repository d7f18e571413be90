package steplimits

import (
	"time"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// Of returns the limits of r.
func Of(r *agentv1.Resources) policy.Limits {
	return policy.Limits{
		CPUMillis: r.GetCpuMillis(), MemoryBytes: r.GetMemoryBytes(), PIDs: r.GetPids(), DiskBytes: r.GetDiskBytes(),
		Inodes: r.GetInodes(), OpenFiles: r.GetOpenFiles(), LogBytes: r.GetLogBytes(), LogRate: r.GetLogRate(),
		ShmBytes: r.GetShmBytes(), StepTimeout: r.GetStepTimeout().AsDuration(),
	}
}

// ForSandbox returns l in the terms of a sandbox.
func ForSandbox(l policy.Limits) sandbox.Limits {
	return sandbox.Limits{
		CPUMillis: l.CPUMillis, MemoryBytes: l.MemoryBytes, PIDs: l.PIDs, DiskBytes: l.DiskBytes, Inodes: l.Inodes,
		OpenFiles: l.OpenFiles, LogBytes: l.LogBytes, LogRate: l.LogRate, ShmBytes: l.ShmBytes, Timeout: l.StepTimeout,
	}
}

// FromSandbox returns l in the terms of policy.
func FromSandbox(l sandbox.Limits) policy.Limits {
	return policy.Limits{
		CPUMillis: l.CPUMillis, MemoryBytes: l.MemoryBytes, PIDs: l.PIDs, DiskBytes: l.DiskBytes, Inodes: l.Inodes,
		OpenFiles: l.OpenFiles, LogBytes: l.LogBytes, LogRate: l.LogRate, ShmBytes: l.ShmBytes, StepTimeout: l.Timeout,
	}
}

// Problem is what is wrong with one limit.
type Problem struct {
	// Field of agentv1.Resources.
	Field string
	Err   error
}

// Check returns what is wrong with limits that no step could run in, or that are none.
func Check(r *agentv1.Resources) []Problem {
	l := Of(r)
	var out []Problem
	for _, f := range []struct {
		name string
		only policy.Limits
	}{
		{"cpu_millis", policy.Limits{CPUMillis: l.CPUMillis}}, {"memory_bytes", policy.Limits{MemoryBytes: l.MemoryBytes}},
		{"pids", policy.Limits{PIDs: l.PIDs}}, {"disk_bytes", policy.Limits{DiskBytes: l.DiskBytes}}, {"inodes", policy.Limits{Inodes: l.Inodes}},
		{"open_files", policy.Limits{OpenFiles: l.OpenFiles}}, {"log_bytes", policy.Limits{LogBytes: l.LogBytes}},
		{"log_rate", policy.Limits{LogRate: l.LogRate}}, {"shm_bytes", policy.Limits{ShmBytes: l.ShmBytes}},
	} {
		if err := ForSandbox(f.only).Validate(); err != nil {
			out = append(out, Problem{f.name, err})
		}
	}
	if d := r.GetStepTimeout(); d != nil && (!d.IsValid() || d.AsDuration() < time.Second) {
		out = append(out, Problem{"step_timeout", errShort})
	}
	return out
}
