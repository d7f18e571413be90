package stepusage

import (
	"cmp"
	"slices"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// maxContacts bounds the destinations of each kind that the API tells of a step, which
// are in its record and in the result of its build.
const maxContacts = 64

// network returns what a step did with its network in the terms of the API; nil: nothing.
func network(c sandbox.Contacts) *agentv1.StepNetwork {
	if len(c.Reached.List)+len(c.Refused.List) == 0 {
		return nil
	}
	out := &agentv1.StepNetwork{}
	out.Reached, out.MoreReached = contacts(c.Reached)
	out.Refused, out.MoreRefused = contacts(c.Refused)
	return out
}

// contacts returns those with the most attempts, in this order, and how many attempts
// there were at others.
func contacts(l sandbox.ContactList) (out []*agentv1.StepContact, more int64) {
	all := slices.Clone(l.List)
	slices.SortFunc(all, func(a, b sandbox.Contact) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), a.Address.Compare(b.Address), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	more = l.More
	for i, c := range all {
		if i >= maxContacts {
			more += c.Count
			continue
		}
		contact := &agentv1.StepContact{Name: c.Name, Protocol: c.Protocol, Port: uint32(c.Port), Count: c.Count}
		if c.Address.IsValid() {
			contact.Address = c.Address.String()
		}
		out = append(out, contact)
	}
	return out, more
}
