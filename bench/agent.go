package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// agentConfig is the agent's configuration; its arguments are the root, the socket, the
// user IDs of the tenants "healthy" and "bomb", and the sandbox.
const agentConfig = `apiVersion: config.kiln.build/v1alpha1
kind: AgentConfiguration
root: %s
listeners:
  unix:
    path: %s
    mode: "0666"
    peers: [{uid: %d, tenant: healthy}, {uid: %d, tenant: bomb}]
sandboxes: {default: %[5]s, enabled: [%[5]s]}
tenants:
  overrides:
    bomb:
      maxRunning: 1
      buildKitClients: allow
      defaultResources: {pids: 512}
      maxResources: {cpu: 250m, memory: 512Mi, pids: 512}
metrics: {address: "0"}
health: {address: "0"}
fetch: {allow: [127.0.0.1/32]}
`

// startAgent starts kiln-agent on a socket, with buildctl as its client.
func startAgent(ctx context.Context, c config, dir string) (peer, error) {
	return newAgent(ctx, c, dir, "userns")
}

func newAgent(ctx context.Context, c config, dir, sandbox string) (*buildkitPeer, error) {
	root, socket := filepath.Join(dir, "root"), filepath.Join(dir, "s")
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "agent.yaml")
	if err := os.WriteFile(conf, fmt.Appendf(nil, agentConfig, root, socket, healthyUID, bombUID, sandbox), 0o600); err != nil {
		return nil, err
	}
	b := &buildkitPeer{name: "agent-buildctl", client: c.buildctl, addr: "unix://" + socket}
	var err error
	b.daemon, err = startDaemon(ctx, b.ready, c.agent, "--config", conf)
	return b, err
}

// agentCLI is an agent with kiln as its client.
type agentCLI struct {
	*buildkitPeer
	kiln string
}

func startAgentCLI(name, sandbox string) func(context.Context, config, string) (peer, error) {
	return func(ctx context.Context, c config, dir string) (peer, error) {
		b, err := newAgent(ctx, c, dir, sandbox)
		if err != nil {
			return nil, err
		}
		b.name = name
		return &agentCLI{buildkitPeer: b, kiln: c.kiln}, nil
	}
}

func (a *agentCLI) Build(ctx context.Context, r request) (usage, error) {
	return a.measure(ctx, 0, a.kiln, kilnArgs(r, "--agent", a.addr)...)
}

// BuildAs implements tenantPeer.
func (a *agentCLI) BuildAs(ctx context.Context, uid uint32, r request) (usage, error) {
	return a.measure(ctx, uid, a.kiln, kilnArgs(r, "--agent", a.addr)...)
}
