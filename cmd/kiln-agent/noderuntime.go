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

const (
	// runtimeTimeout bounds a question to the node's container runtime.
	runtimeTimeout = 10 * time.Second
	// localTimeout bounds what is asked for one Probe, which the controller awaits.
	localTimeout = 500 * time.Millisecond
)

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

// localBytes returns what tells how much of images the node's container runtime has.
// What is not known in time does not count.
func localBytes(runtime nodestore.Node, log *slog.Logger) func(context.Context, []string) int64 {
	return func(ctx context.Context, images []string) (total int64) {
		ask, cancel := context.WithTimeout(ctx, localTimeout)
		defer cancel()
		for _, image := range images {
			name, err := nodestore.ParseName(image)
			if err != nil {
				continue // the build will say so
			}
			size, err := runtime.Bytes(ask, name)
			if err != nil {
				log.Warn("the node's runtime does not tell what it has of an image", "image", name.String(), "error", err)
				if ask.Err() != nil {
					break
				}
				continue
			}
			total += size
		}
		return total
	}
}
