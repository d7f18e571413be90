package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/sandbox/policy"
)

func TestClassOfBuildKitClientsUnderPoliciesOfTheCluster(t *testing.T) {
	for _, c := range []struct {
		name  string
		rules []policy.Rules
		want  string
	}{
		{"none", nil, policy.Userns},
		{"required class", []policy.Rules{{RequiredClass: policy.GVisor}}, policy.GVisor},
		{"default class", []policy.Rules{{DefaultClass: policy.GVisor}}, policy.GVisor},
		{"default of the agent is not allowed", []policy.Rules{{Classes: []string{policy.GVisor}}}, policy.GVisor},
		{"contradiction", []policy.Rules{{RequiredClass: policy.GVisor}, {RequiredClass: policy.Userns}}, ""},
		{"egress allowed", []policy.Rules{{Networks: []string{policy.NetworkNone, policy.NetworkEgress}}}, policy.Userns},
		{"no egress", []policy.Rules{{Networks: []string{policy.NetworkNone}}}, ""},
		{"registries", []policy.Rules{{Push: []string{"registry.example.com"}}}, ""},
		{"limits", []policy.Rules{{Max: policy.Limits{PIDs: 1}}}, ""},
		{"timeout", []policy.Rules{{MaxTimeout: time.Hour}}, ""},
		{"not known yet", []policy.Rules{{Classes: []string{"none"}}}, ""},
	} {
		got, err := buildKitClass(c.rules, policy.Userns)
		require.Equal(t, c.want, got, c.name)
		if c.want == "" {
			require.Equal(t, codes.PermissionDenied, status.Code(err), c.name)
		}
	}
}

func TestRulesOfTheClusterComeOnTop(t *testing.T) {
	own := agent.RulePolicy(func(string) agent.TenantRules {
		return agent.TenantRules{Rules: []policy.Rules{{Name: "own", DefaultClass: policy.Userns}}}
	})
	got := withCluster(own, func(string) []policy.Rules { return []policy.Rules{{Name: "cluster", RequiredClass: policy.GVisor}} })("a")
	require.Equal(t, policy.GVisor, policy.Complete(got.Rules, policy.Request{}).Class)
	require.NotEmpty(t, policy.Check(got.Rules, policy.Request{Class: policy.Userns}))
}
