package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/sandbox"
)

// TestMostOfATenant has policy limit steps, whoever asks for them.
func TestMostOfATenant(t *testing.T) {
	most := mostOf(&config.Agent{Tenants: config.Tenants{
		Defaults:  config.Policy{MaxResources: config.Resources{CPU: "1500m", Memory: "1Gi"}},
		Overrides: map[string]config.Policy{"small": {MaxResources: config.Resources{Memory: "64Mi", PIDs: 100}}},
	}})
	require.Equal(t, sandbox.Limits{CPUMillis: 1500, MemoryBytes: 1 << 30}, most(engine.Domain{Tenant: "other", Sandbox: sandbox.GVisor}))
	require.Equal(t, sandbox.Limits{CPUMillis: 1500, MemoryBytes: 64 << 20, PIDs: 100}, most(engine.Domain{Tenant: "small", Sandbox: sandbox.Userns}))
}
