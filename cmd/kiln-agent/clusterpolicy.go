package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/clusterpolicy"
	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// policyPatience is how long the start waits for the API server.
const policyPatience = 10 * time.Second

// clusterRules are the rules of the cluster's SandboxPolicies for a tenant.
type clusterRules func(tenant string) []policy.Rules

// followPolicies follows the cluster's SandboxPolicies until the returned function is
// called. Without the configuration for it no such rule holds.
func followPolicies(cfg *config.Agent) (clusterRules, func() error, error) {
	if cfg.Tenants.SandboxPolicies == nil {
		return func(string) []policy.Rules { return nil }, func() error { return nil }, nil
	}
	var access *rest.Config
	var err error
	if file := cfg.Tenants.SandboxPolicies.Kubeconfig; file == "" {
		access, err = rest.InClusterConfig()
	} else {
		access, err = clientcmd.BuildConfigFromFlags("", file)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("follow SandboxPolicies: %w", err)
	}
	policies, err := clusterpolicy.New(access)
	if err != nil {
		return nil, nil, fmt.Errorf("follow SandboxPolicies: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		policies.Run(ctx)
	}()
	// Builds that come in the first moments would be refused for good.
	for end := time.Now().Add(policyPatience); policies.Ready() != nil && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	return policies.Rules, func() error { cancel(); <-done; return nil }, nil
}

// withCluster adds the cluster's rules to those of the configuration: what either refuses
// is refused. A default of the cluster counts before one of the configuration.
func withCluster(own agent.RulePolicy, cluster clusterRules) agent.RulePolicy {
	return func(tenant string) agent.TenantRules {
		r := own(tenant)
		r.Rules = append(cluster(tenant), r.Rules...)
		return r
	}
}

// buildKitClass returns the class of sandbox for BuildKit's clients of a tenant. They can
// ask for no class, and what they pull, push and use is not known when they call: rules
// about that cannot be held, so they refuse such clients altogether.
func buildKitClass(rules []policy.Rules, byDefault string) (string, error) {
	refuse := func(name, why string) error {
		return status.Errorf(codes.PermissionDenied, "SandboxPolicy %q %s, which cannot be held for BuildKit's clients; use kiln", name, why)
	}
	for _, r := range rules {
		switch {
		case len(r.Pull)+len(r.Push) > 0:
			return "", refuse(r.Name, "restricts registries")
		case len(r.Networks) > 0 && !slices.Contains(r.Networks, policy.NetworkEgress):
			return "", refuse(r.Name, "restricts the network")
		case r.Max != policy.Limits{} || r.MaxTimeout > 0:
			return "", refuse(r.Name, "limits resources or time")
		}
	}
	req := policy.Complete(rules, policy.Request{})
	if req.Class == "" {
		req.Class = byDefault
	}
	req.Network = policy.NetworkEgress // Every rule allows it, as seen above.
	for _, denied := range policy.Check(rules, req) {
		return "", status.Error(codes.PermissionDenied, denied.Error())
	}
	return req.Class, nil
}
