package buildopt

import (
	"fmt"
	"strconv"
	"time"

	"github.com/kiln-build/kiln/agent/steplimits"
	"github.com/kiln-build/kiln/sandbox/policy"
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
	more, err := b.moreLimits()
	if err != nil {
		return err
	}
	if text := steplimits.Encode(more); text != "" {
		attrs[steplimits.Key] = text
	}
	if quota > 0 {
		attrs["cpuperiod"], attrs["cpuquota"] = strconv.Itoa(cpuPeriod), strconv.FormatInt(quota, 10)
	}
	return nil
}

// moreLimits returns the limits that BuildKit has no words for.
func (b *builder) moreLimits() (policy.Limits, error) {
	var l policy.Limits
	var err error
	if l.PIDs, err = ParsePIDs(b.flags.PIDsLimit); err != nil {
		return l, fmt.Errorf("--pids-limit: %w", err)
	}
	if l.DiskBytes, err = ParseSize(b.flags.Disk); err != nil {
		return l, fmt.Errorf("--disk: %w", err)
	}
	if l.StepTimeout, err = parseTimeout(b.flags.StepTimeout); err != nil {
		return l, fmt.Errorf("--step-timeout: %w", err)
	}
	if err := steplimits.ForSandbox(l).Validate(); err != nil {
		return l, fmt.Errorf("--pids-limit, --disk, --step-timeout: %w", err)
	}
	return l, nil
}

// destinations sets what alone the steps may connect to. It changes no step's place in the
// cache.
func (b *builder) destinations() error {
	list := b.flags.Destinations
	if problems := (policy.Destinations{Allow: list}).Problems(); len(problems) > 0 {
		return fmt.Errorf("--destination: %w", problems[0].Err)
	}
	if len(list) > 0 {
		b.solve.FrontendAttrs[steplimits.DestinationsKey] = steplimits.EncodeDestinations(list)
	}
	return nil
}

// ParsePIDs parses a number of processes. An empty string, and what stands for no limit in
// docker run (0 and -1), is 0.
func ParsePIDs(s string) (int64, error) {
	if s == "" || s == "0" || s == "-1" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("invalid number %q: want a number of processes and threads, such as 500", s)
	}
	return n, nil
}

// parseTimeout parses how long a step may run. An empty string is 0.
func parseTimeout(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < time.Second {
		return 0, fmt.Errorf("invalid time %q: want a time from 1s, such as 90s or 1h30m", s)
	}
	return d, nil
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
