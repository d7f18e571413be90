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
	// Destinations are what builds may connect to.
	Destinations Destinations
	// Pull holds patterns of repositories that images may come from; see Match.
	Pull []string
	// Push holds patterns of repositories that images may go to.
	Push []string
	// Frontends are what may read a build's definition: BuiltIn, and patterns of
	// repositories that front ends come from.
	Frontends []string
	// Mounts are the types of mounts (MountCache and so on) that steps may have besides
	// layers of the build.
	Mounts []string
	// Max is the most that a build may ask for; it is also the limit of a build that
	// names none.
	Max Limits
	// MaxTimeout is the longest that a build may run.
	MaxTimeout time.Duration
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
	// Frontends holds what is known to read the build's definition: BuiltIn, or the names
	// of images of front ends.
	Frontends []Image
	// Mounts are types of mounts that steps are known to have.
	Mounts []MountType
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
	// Policy is the name of the policy that refuses; empty: none has to say it.
	Policy string
	// Field of the request that is refused.
	Field string
	// Name is the rule's: the field of the policy, such as "network.allowed", or the name
	// of a rule that holds whatever policies say.
	Name string
	// Rule is what the policy says, as a sentence.
	Rule string
}

func (d *Denied) Error() string {
	if d.Policy == "" {
		return fmt.Sprintf("%s: denied by rule %s: %s", d.Field, d.Name, d.Rule)
	}
	return fmt.Sprintf("%s: denied by SandboxPolicy %q, rule %s: %s", d.Field, d.Policy, d.Name, d.Rule)
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
	var timeout time.Duration
	for _, p := range all {
		timeout = tighter(timeout, p.MaxTimeout)
	}
	r.Limits = r.Limits.Or(Limits{}, Most(all))
	r.Timeout = first(r.Timeout, timeout)
	return r
}

// Check returns every reason against r as *Denied. r should have been through
// Complete and then have the defaults of the place where it will run: an empty class or
// network is refused when a rule restricts it, because nobody can tell what it will be.
func Check(all []Rules, r Request) []*Denied {
	var out []*Denied
	for _, p := range all {
		deny := func(field, name, rule string, args ...any) {
			out = append(out, &Denied{Policy: p.Name, Field: field, Name: name, Rule: fmt.Sprintf(rule, args...)})
		}
		checkClass(deny, "spec.runtimeClassName", r.Class, p)
		checkNetwork(deny, "spec.network", r.Network, p)
		checkLimits(deny, limit.field, r.Limits, p.Max)
		if p.MaxTimeout > 0 && (r.Timeout <= 0 || r.Timeout > p.MaxTimeout) {
			deny("spec.timeout", "maxTimeout", "at most %s", p.MaxTimeout)
		}
		checkImages(deny, "registries.pull", "pulled from", r.Pull, p.Pull)
		checkImages(deny, "registries.push", "pushed to", r.Push, p.Push)
		checkFrontends(deny, r.Frontends, p.Frontends)
		for _, m := range r.Mounts {
			checkMountType(deny, m, p.Mounts)
		}
	}
	return out
}

type denyFunc func(field, name, rule string, args ...any)

func checkClass(deny denyFunc, field, class string, p Rules) {
	checkChoice(deny, field, "sandboxClasses", "sandbox", class, classes, p.Classes, p.RequiredClass)
}

func checkNetwork(deny denyFunc, field, network string, p Rules) {
	checkChoice(deny, field, "network", "network", network, networks, p.Networks, "")
}

func checkChoice(deny denyFunc, field, rule, noun, got string, known, allowed []string, required string) {
	switch {
	case got != "" && !slices.Contains(known, got):
		deny(field, rule, "%s %q is unknown", noun, got)
	case required != "" && got != required:
		deny(field, rule+".required", "%s must be %s, not %s", noun, required, or(got, "the default"))
	case len(allowed) > 0 && !slices.Contains(allowed, got):
		deny(field, rule+".allowed", "%s must be one of %s, not %s", noun, strings.Join(allowed, ", "), or(got, "the default"))
	}
}

func checkImages(deny denyFunc, rule, how string, images []Image, patterns []string) {
	if len(patterns) == 0 {
		return
	}
	for _, img := range images {
		repo, err := Repository(img.Name)
		if err != nil {
			deny(img.Field, rule, "image %q cannot be understood: %v", img.Name, err)
			continue
		}
		if !MatchAny(patterns, repo) {
			deny(img.Field, rule, "images may not be %s %s; allowed: %s", how, repo, strings.Join(patterns, ", "))
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
