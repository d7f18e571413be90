package buildopt

import (
	"fmt"
	"strconv"
)

const (
	// cpuPeriod is the period that a limit of CPUs is told in, in microseconds.
	cpuPeriod = 100_000
	// maxCPUs is more than any machine has.
	maxCPUs = 1 << 16
	// minMemory is the least that a step may be limited to, in bytes.
	minMemory = 4 << 20
)

// limits sets the limits of every step. They change no result, and no step's place in
// the cache.
func (b *builder) limits() error {
	memory, err := ParseSize(b.flags.Memory)
	if err != nil {
		return fmt.Errorf("--memory: %w", err)
	}
	if b.flags.Memory != "" && memory < minMemory {
		return fmt.Errorf("--memory %s: want 4m or more", b.flags.Memory)
	}
	quota, err := parseCPUs(b.flags.CPUs)
	if err != nil {
		return fmt.Errorf("--cpus: %w", err)
	}
	attrs := b.solve.FrontendAttrs
	if memory > 0 {
		attrs["memory"] = strconv.FormatInt(memory, 10)
	}
	if quota > 0 {
		attrs["cpuperiod"], attrs["cpuquota"] = strconv.Itoa(cpuPeriod), strconv.FormatInt(quota, 10)
	}
	return nil
}

// parseCPUs returns the CPU time in a period of who may use a number of processors such
// as 1.5. An empty string is 0.
func parseCPUs(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || !(n >= 0.01 && n <= maxCPUs) {
		return 0, fmt.Errorf("invalid number %q: want a number of processors from 0.01, such as 1.5", s)
	}
	return int64(n * cpuPeriod), nil
}
