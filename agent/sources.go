package agent

import (
	spb "github.com/moby/buildkit/sourcepolicy/pb"

	"github.com/kiln-build/kiln/sandbox/policy"
)

// imageScheme begins the engine's names of images.
const imageScheme = "docker-image://"

// Sources implements Policy.
func (p RulePolicy) Sources(tenant string) *spb.Policy {
	patterns, restricted := policy.PullPatterns(p(tenant).Rules)
	if !restricted {
		return nil
	}
	// Of the rules that match the last counts.
	out := &spb.Policy{Version: 1, Rules: []*spb.Rule{{
		Action: spb.PolicyAction_DENY, Selector: &spb.Selector{Identifier: "^" + imageScheme, MatchType: spb.MatchType_REGEX},
	}}}
	for _, pattern := range patterns {
		out.Rules = append(out.Rules, &spb.Rule{Action: spb.PolicyAction_ALLOW, Selector: &spb.Selector{
			Identifier: "^" + imageScheme + policy.Regexp(pattern)[1:], MatchType: spb.MatchType_REGEX,
		}})
	}
	return out
}
