package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// TestRulesOfSteps has policy limit steps, whoever asks for them: that of the
// configuration, with a tenant's own, and that of the cluster.
func TestRulesOfSteps(t *testing.T) {
	cluster := func(tenant string) []policy.Rules {
		if tenant != "small" {
			return nil
		}
		return []policy.Rules{{Name: "tier", Max: policy.Limits{PIDs: 50}}}
	}
	rules := stepRules(withCluster(rules(&config.Agent{Tenants: config.Tenants{
		Defaults: config.Policy{
			MaxResources:     config.Resources{CPU: "1500m", Memory: "1Gi", StepTimeout: "10m", Log: "1Mi", LogRate: "1Ki", Shm: "64Mi", OpenFiles: 1024, Inodes: 1e6, Disk: "1Gi"},
			DefaultResources: config.Resources{PIDs: 200},
		},
		Overrides: map[string]config.Policy{"small": {MaxResources: config.Resources{Memory: "64Mi", PIDs: 100}, Mounts: []string{"secret"}}},
	}}), cluster))
	all := policy.Limits{
		CPUMillis: 1500, MemoryBytes: 1 << 30, StepTimeout: 10 * time.Minute, LogBytes: 1 << 20, LogRate: 1 << 10,
		ShmBytes: 64 << 20, OpenFiles: 1024, Inodes: 1e6, DiskBytes: 1 << 30,
	}
	other := rules(engine.Domain{Tenant: "other", Sandbox: sandbox.GVisor})
	require.Equal(t, all, policy.Most(other.Rules))
	require.Equal(t, policy.Limits{PIDs: 200}, other.Defaults)
	small := rules(engine.Domain{Tenant: "small", Sandbox: sandbox.Userns})
	all.MemoryBytes, all.PIDs = 64<<20, 50
	require.Equal(t, all, policy.Most(small.Rules))
	require.Equal(t, []string{"secret"}, small.Rules[1].Mounts)
}
