package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Classes and networks that rules and requests name.
const (
	GVisor = "gvisor"
	Userns = "userns"

	NetworkNone   = "none"
	NetworkEgress = "egress"
)

var (
	classes  = []string{GVisor, Userns}
	networks = []string{NetworkNone, NetworkEgress}
)

// Rules is what one policy says. An empty field says nothing.
type Rules struct {
	// Name of the policy, for refusals.
	Name string
	// Classes that a build may use.
	Classes []string
	// RequiredClass is the only one that it may use.
	RequiredClass string
	// DefaultClass is that of a build that names none.
	DefaultClass string
	// Networks that a build may use.
	Networks []string
	// DefaultNetwork is that of a build that names none.
	DefaultNetwork string
	// Pull holds patterns of repositories that images may come from; see Match.
	Pull []string
	// Push holds patterns of repositories that images may go to.
	Push []string
	// Max is the most that a build may ask for; it is also the limit of a build that
	// names none.
	Max Limits
	// MaxTimeout is the longest that a build may run.
	MaxTimeout time.Duration
}

// Limits of a build; 0 is no limit.
type Limits struct {
	// CPUMillis is CPU time per time in thousandths.
	CPUMillis int64
	// MemoryBytes is memory.
	MemoryBytes int64
	// PIDs is processes and threads.
	PIDs int64
	// DiskBytes is what the build may write.
	DiskBytes int64
}

// Request is what a build asks for. An empty field asks for the default.
type Request struct {
	// Class of sandbox.
	Class string
	// Network of steps.
	Network string
	// Limits of each step.
	Limits Limits
	// Timeout of the build.
	Timeout time.Duration
	// Pull holds the names of images that are known to be read.
	Pull []Image
	// Push holds the names of images that will be written.
	Push []Image
}

// Image is the name of an image and the field of the request that has it.
type Image struct {
	// Field is where the name was written, such as "spec.output.image".
	Field string
	// Name is a reference as users write it.
	Name string
}

// Denied is a refusal.
type Denied struct {
	// Policy is the name of the policy that refuses.
	Policy string
	// Field of the request that is refused.
	Field string
	// Rule is what the policy says, as a sentence.
	Rule string
}

func (d *Denied) Error() string {
	return fmt.Sprintf("%s: denied by SandboxPolicy %q: %s", d.Field, d.Policy, d.Rule)
}

// Complete returns r with what it leaves out filled in from all: the required or
// default class, the default network, limits and timeout. What no policy decides is
// left empty for the node's own defaults.
func Complete(all []Rules, r Request) Request {
	for _, p := range all {
		if r.Class == "" {
			r.Class = first(p.RequiredClass, p.DefaultClass, only(p.Classes))
		}
		if r.Network == "" {
			r.Network = first(p.DefaultNetwork, only(p.Networks))
		}
	}
	var most Limits
	var timeout time.Duration
	for _, p := range all {
		most = Limits{
			CPUMillis: tighter(most.CPUMillis, p.Max.CPUMillis), MemoryBytes: tighter(most.MemoryBytes, p.Max.MemoryBytes),
			PIDs: tighter(most.PIDs, p.Max.PIDs), DiskBytes: tighter(most.DiskBytes, p.Max.DiskBytes),
		}
		timeout = tighter(timeout, p.MaxTimeout)
	}
	r.Limits = Limits{
		CPUMillis: first(r.Limits.CPUMillis, most.CPUMillis), MemoryBytes: first(r.Limits.MemoryBytes, most.MemoryBytes),
		PIDs: first(r.Limits.PIDs, most.PIDs), DiskBytes: first(r.Limits.DiskBytes, most.DiskBytes),
	}
	r.Timeout = first(r.Timeout, timeout)
	return r
}

// Check returns every reason against r as *Denied. r should have been through
// Complete and then have the defaults of the place where it will run: an empty class or
// network is refused when a rule restricts it, because nobody can tell what it will be.
func Check(all []Rules, r Request) []*Denied {
	var out []*Denied
	for _, p := range all {
		deny := func(field, rule string, args ...any) {
			out = append(out, &Denied{Policy: p.Name, Field: field, Rule: fmt.Sprintf(rule, args...)})
		}
		checkChoice(deny, "spec.runtimeClassName", "sandbox", r.Class, classes, p.Classes, p.RequiredClass)
		checkChoice(deny, "spec.network", "network", r.Network, networks, p.Networks, "")
		checkLimit(deny, "spec.resources.limits[cpu]", "thousandths of a CPU", r.Limits.CPUMillis, p.Max.CPUMillis)
		checkLimit(deny, "spec.resources.limits[memory]", "bytes", r.Limits.MemoryBytes, p.Max.MemoryBytes)
		checkLimit(deny, "spec.resources.limits[kiln.build/pids]", "processes", r.Limits.PIDs, p.Max.PIDs)
		checkLimit(deny, "spec.resources.limits[ephemeral-storage]", "bytes", r.Limits.DiskBytes, p.Max.DiskBytes)
		if p.MaxTimeout > 0 && (r.Timeout <= 0 || r.Timeout > p.MaxTimeout) {
			deny("spec.timeout", "at most %s", p.MaxTimeout)
		}
		checkImages(deny, "pulled from", r.Pull, p.Pull)
		checkImages(deny, "pushed to", r.Push, p.Push)
	}
	return out
}

type denyFunc func(field, rule string, args ...any)

func checkChoice(deny denyFunc, field, noun, got string, known, allowed []string, required string) {
	switch {
	case got != "" && !slices.Contains(known, got):
		deny(field, "%s %q is unknown", noun, got)
	case required != "" && got != required:
		deny(field, "%s must be %s, not %s", noun, required, or(got, "the default"))
	case len(allowed) > 0 && !slices.Contains(allowed, got):
		deny(field, "%s must be one of %s, not %s", noun, strings.Join(allowed, ", "), or(got, "the default"))
	}
}

func checkLimit(deny denyFunc, field, unit string, got, most int64) {
	if got < 0 {
		deny(field, "a limit cannot be negative")
	} else if most > 0 && (got == 0 || got > most) {
		deny(field, "at most %d %s", most, unit)
	}
}

func checkImages(deny denyFunc, how string, images []Image, patterns []string) {
	if len(patterns) == 0 {
		return
	}
	for _, img := range images {
		repo, err := Repository(img.Name)
		if err != nil {
			deny(img.Field, "image %q cannot be understood: %v", img.Name, err)
			continue
		}
		if !MatchAny(patterns, repo) {
			deny(img.Field, "images may not be %s %s; allowed: %s", how, repo, strings.Join(patterns, ", "))
		}
	}
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func only(s []string) string {
	if len(s) == 1 {
		return s[0]
	}
	return ""
}

func first[T comparable](values ...T) T {
	var zero T
	for _, v := range values {
		if v != zero {
			return v
		}
	}
	return zero
}

// tighter returns the smaller of two limits, of which 0 is none.
func tighter[T int64 | time.Duration](a, b T) T {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}
