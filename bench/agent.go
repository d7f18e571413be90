package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// agentConfig is the agent's configuration; its arguments are the root and the socket.
const agentConfig = `apiVersion: config.kiln.build/v1alpha1
kind: AgentConfiguration
root: %s
listeners: {unix: {path: %s}}
sandboxes: {default: userns, enabled: [userns]}
metrics: {address: "0"}
health: {address: "0"}
fetch: {allow: [127.0.0.1/32]}
`

// startAgent starts kiln-agent on a socket, with buildctl as its client.
func startAgent(ctx context.Context, c config, dir string) (peer, error) {
	root, socket := filepath.Join(dir, "root"), filepath.Join(dir, "s")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "agent.yaml")
	if err := os.WriteFile(conf, fmt.Appendf(nil, agentConfig, root, socket), 0o600); err != nil {
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

func startAgentCLI(ctx context.Context, c config, dir string) (peer, error) {
	p, err := startAgent(ctx, c, dir)
	if err != nil {
		return nil, err
	}
	b := p.(*buildkitPeer)
	b.name = "agent-kiln"
	return &agentCLI{buildkitPeer: b, kiln: c.kiln}, nil
}

func (a *agentCLI) Build(ctx context.Context, r request) (usage, error) {
	return a.measure(ctx, a.kiln, kilnArgs(r, "--agent", a.addr)...)
}
