package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/kiln-build/kiln/agent/config"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/snapshot/nodestore"
	"github.com/kiln-build/kiln/snapshot/nodestore/containerd"
)

// runtimeTimeout bounds a question to the node's container runtime.
const runtimeTimeout = 10 * time.Second

// connectRuntime connects to the node's container runtime. It returns nil when none
// is configured; else the caller closes it.
func connectRuntime(ctx context.Context, cfg config.NodeRuntime) (nodestore.Node, error) {
	if cfg.Socket == "" {
		return nil, nil
	}
	dial, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	runtime, err := containerd.New(dial, containerd.Config{Socket: cfg.Socket})
	if err != nil {
		return nil, fmt.Errorf("connect to the node's runtime at %s (nodeRuntime.socket): %w", cfg.Socket, err)
	}
	return runtime, nil
}

// describeRuntime returns what tells clients about the node's container runtime.
func describeRuntime(runtime nodestore.Node, log *slog.Logger) func(context.Context) *agentv1.NodeRuntime {
	return func(ctx context.Context) *agentv1.NodeRuntime {
		ask, cancel := context.WithTimeout(ctx, runtimeTimeout)
		defer cancel()
		info, err := runtime.Info(ask)
		if err != nil {
			log.Warn("the node's runtime does not answer", "error", err)
			return nil
		}
		return &agentv1.NodeRuntime{Name: info.Runtime, Version: info.Version, Snapshotter: info.Snapshotter}
	}
}
