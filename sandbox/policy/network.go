package policy

import (
	"fmt"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// MaxDestinations bounds each list of destinations.
const MaxDestinations = 256

// Destinations are rules about where builds may connect to, from their steps and by what
// is fetched for them.
type Destinations struct {
	// Allow is all that may be reached, written as egress.ParseException has it; none:
	// what is not denied.
	Allow []string
	// Deny holds CIDRs and addresses that may not be reached, besides those of
	// everyone.
	Deny []string
}

// Empty tells whether d says nothing.
func (d Destinations) Empty() bool { return len(d.Allow)+len(d.Deny) == 0 }

// Problem is what is wrong with an entry.
type Problem struct {
	// List is "allow" or "deny", Index the place of the entry in it; -1: the list is
	// too long.
	List  string
	Index int
	Err   error
}

// Problems returns what is wrong with d.
func (d Destinations) Problems() []Problem {
	out := check("allow", d.Allow, func(s string) error { _, err := egress.ParseException(s); return err })
	return append(out, check("deny", d.Deny, func(s string) error { _, err := egress.ParseRange(s, ""); return err })...)
}

func check(list string, entries []string, parse func(string) error) []Problem {
	if len(entries) > MaxDestinations {
		return []Problem{{list, -1, fmt.Errorf("%d entries: at most %d", len(entries), MaxDestinations)}}
	}
	var out []Problem
	for i, s := range entries {
		if err := parse(s); err != nil {
			out = append(out, Problem{list, i, err})
		}
	}
	return out
}

// Egress returns what all rules say about destinations. Rules that cannot be understood
// permit nothing.
func Egress(all []Rules) []egress.Rules {
	var out []egress.Rules
	for _, r := range all {
		if r.Destinations.Empty() {
			continue
		}
		e := egress.Rules{Name: fmt.Sprintf("SandboxPolicy %q", r.Name)}
		ok := len(r.Destinations.Problems()) == 0
		if ok {
			e.Allow, _ = egress.ParseExceptions(r.Destinations.Allow)
			for _, s := range r.Destinations.Deny {
				d, _ := egress.ParseRange(s, "denied")
				e.Deny = append(e.Deny, d)
			}
		} else {
			// An exception that is about nothing.
			e.Allow = []egress.Exception{{}}
		}
		out = append(out, e)
	}
	return out
}
