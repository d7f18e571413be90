package agent

import (
	"testing"

	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox/policy"
	"regexp"
)

func TestEngineFetchesImagesOnlyFromWherePolicySays(t *testing.T) {
	rules := func(r ...policy.Rules) RulePolicy {
		return func(string) TenantRules { return TenantRules{Rules: r} }
	}
	require.Nil(t, rules(policy.Rules{}).Sources("team-a"))
	got := rules(policy.Rules{Pull: []string{"docker.io/library", "*.example.com"}}, policy.Rules{Pull: []string{"docker.io", "r.example.com/base"}}).Sources("team-a")
	for ref, want := range map[string]bool{
		"docker-image://docker.io/library/debian:12":                 true,
		"docker-image://r.example.com/base/go:1@sha256:0123":         true,
		"docker-image://docker.io/evil/debian:12":                    false,
		"docker-image://r.example.com/based/go:1":                    false,
		"docker-image://other.example.com/base/go:1":                 false,
		"docker-image://debian":                                      false, // not in full: nobody can tell
		"docker-image://evil.org/docker-image://docker.io/library/x": false,
		"git://github.com/a/b":                                       true, // no image
	} {
		allowed := true
		for _, r := range got.Rules {
			require.Equal(t, spb.MatchType_REGEX, r.Selector.MatchType)
			if regexp.MustCompile(r.Selector.Identifier).MatchString(ref) {
				allowed = r.Action == spb.PolicyAction_ALLOW
			}
		}
		require.Equal(t, want, allowed, ref)
	}
}
