package userns

import (
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"

	"github.com/kiln-build/kiln/sandbox/userns/filter"
)

// filters are the system call filters of steps, made when needed first.
type filters struct {
	native, foreign func() ([]bpf.RawInstruction, error)
}

func newFilters(template *specs.Spec) *filters {
	profile := template.Linux.Seccomp
	compile := func(arches []specs.Arch) func() ([]bpf.RawInstruction, error) {
		return sync.OnceValues(func() ([]bpf.RawInstruction, error) {
			p := *profile
			p.Architectures = arches
			return filter.Compile(&p)
		})
	}
	return &filters{native: compile(nil), foreign: compile(profile.Architectures)}
}

// of returns the filter for a root. A part for another architecture that no program
// of the root needs is left out: what no one needs, no one attacks.
func (f *filters) of(foreign bool) ([]bpf.RawInstruction, error) {
	if foreign {
		return f.foreign()
	}
	return f.native()
}
