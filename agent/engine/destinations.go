package engine

import (
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// stepEgress is what steps of everyone may reach: what may be fetched, without the
// exceptions that are for the agent alone.
func stepEgress(fetch *egress.Policy) *egress.Policy {
	if fetch == nil {
		return &egress.Policy{}
	}
	return &egress.Policy{Deny: fetch.Deny, DenyPrivate: fetch.DenyPrivate, NodeAddresses: fetch.NodeAddresses}
}

// rulesOf returns what the policies of a domain say about destinations now.
func (n *Node) rulesOf(d Domain) func() []egress.Rules {
	if n.cfg.Rules == nil {
		return nil
	}
	return func() []egress.Rules { return policy.Egress(n.cfg.Rules(d).Rules) }
}
