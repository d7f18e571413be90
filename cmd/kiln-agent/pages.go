package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/agent/server"
)

// startPages serves metrics and health, on one address or on two, until ctx ends.
func startPages(ctx context.Context, group *errgroup.Group, cfg *config.Agent, builds *agent.Agent, registry *prometheus.Registry, log *slog.Logger) error {
	muxes := map[string]*http.ServeMux{}
	at := func(address string) *http.ServeMux {
		if muxes[address] == nil {
			muxes[address] = http.NewServeMux()
		}
		return muxes[address]
	}
	if a := cfg.Metrics.Address; a != config.Off {
		at(a).Handle("/metrics", server.MetricsHandler(registry, log))
	}
	if a := cfg.Health.Address; a != config.Off {
		at(a).Handle("/healthz", server.LivenessHandler())
		at(a).Handle("/readyz", server.ReadinessHandler(func() error {
			if builds.Draining() {
				return errors.New("the agent is ending and takes no builds")
			}
			return nil
		}))
	}
	for address, mux := range muxes {
		l, err := server.ListenTCP(ctx, address)
		if err != nil {
			return err
		}
		log.Info("pages", "address", "http://"+l.Addr().String())
		group.Go(func() error { return server.ServeHTTP(ctx, l, mux, log) })
	}
	return nil
}
