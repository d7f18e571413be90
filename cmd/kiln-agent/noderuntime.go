package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/config"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/snapshot/nodestore/containerd"
)

// runtimeTimeout bounds a question to the node's container runtime.
const runtimeTimeout = 10 * time.Second

// useNodeRuntime connects to the node's container runtime, if one is configured, and
// has the agent describe it and store images in it. The returned function ends the
// connection.
func useNodeRuntime(ctx context.Context, cfg config.NodeRuntime, to *agent.Config, log *slog.Logger) (func() error, error) {
	if cfg.Socket == "" {
		return func() error { return nil }, nil
	}
	dial, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	runtime, err := containerd.New(dial, containerd.Config{Socket: cfg.Socket})
	if err != nil {
		return nil, fmt.Errorf("connect to the node's runtime at %s: %w", cfg.Socket, err)
	}
	to.Images = runtime
	to.NodeRuntime = func(ctx context.Context) *agentv1.NodeRuntime {
		ask, cancel := context.WithTimeout(ctx, runtimeTimeout)
		defer cancel()
		info, err := runtime.Info(ask)
		if err != nil {
			log.Warn("the node's runtime does not answer", "error", err)
			return nil
		}
		return &agentv1.NodeRuntime{Name: info.Runtime, Version: info.Version, Snapshotter: info.Snapshotter}
	}
	return runtime.Close, nil
}
