package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	"github.com/kiln-build/kiln/agent/server"
	"github.com/kiln-build/kiln/cmd/internal/program"
	"github.com/kiln-build/kiln/snapshot"
)

const (
	// lockPatience is how long an agent that is ending may keep the root.
	lockPatience = 5 * time.Second
	// stopTimeout bounds how long calls may go on after all builds have ended.
	stopTimeout = 5 * time.Second
)

// run is the agent: it starts part after part, serves until ctx ends, and then ends
// the parts in the reverse order.
func run(ctx context.Context, cfg *config.Agent, log *slog.Logger) (err error) {
	var down teardown
	defer func() { err = errors.Join(err, down.run()) }()

	name, err := nodeName(cfg)
	if err != nil {
		return err
	}
	unlock, err := lockRoot(ctx, cfg.Root)
	if err != nil {
		return err
	}
	down.add(unlock)
	runsc := program.Find(cfg.Sandboxes.RunscPath, "runsc")
	sandboxes, err := checkSandboxes(ctx, cfg, runsc, log)
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	tracing, err := startTracing(ctx, cfg.Tracing, name)
	if err != nil {
		return err
	}
	down.add(tracing.stop)
	registry := newRegistry(name)
	metrics := agent.NewMetrics(registry)
	steps := agent.NewSteps(metrics)
	runtime, err := connectRuntime(ctx, cfg.NodeRuntime)
	if err != nil {
		return err
	}
	if runtime != nil {
		down.add(runtime.Close)
	}
	fetch, err := fetchPolicy(ctx, cfg.Fetch)
	if err != nil {
		return err
	}
	cluster, stopFollowing, err := followPolicies(cfg)
	if err != nil {
		return err
	}
	down.add(stopFollowing)
	policies := withCluster(rules(cfg), cluster)
	disk := diskSize(cfg.Root)
	node, err := engine.OpenNode(context.WithoutCancel(ctx), engine.NodeConfig{
		Root: cfg.Root, RunscPath: runsc, Frontends: cfg.Frontends,
		Lender: runtime, Space: space(cfg.GC, disk), Fetch: fetch, Rules: stepRules(policies), OnStep: nodeengine.Reporter(steps),
		Stays: true, OnLoss: func() {
			log.Warn("the node went down before the build cache was on its disk: the cache was removed", "root", cfg.Root)
		},
	})
	if err != nil {
		return fmt.Errorf("open engines: %w", err)
	}
	down.add(node.Close)
	node.Warm(available(sandboxes)...)

	agentCfg := agent.Config{
		Root: cfg.Root, Node: name, Version: program.Version(), BuildKitVersion: program.ModuleVersion("github.com/moby/buildkit"),
		Sandboxes: constant(sandboxes), Engines: nodeengine.New(node), Policy: policies, Steps: steps,
		Queue: queueLimits(cfg, disk), Records: recordLimits(cfg.Records), Uploads: uploadLimits(cfg, disk),
		Metrics: metrics, Tracer: tracing.provider, Logger: log,
	}
	if runtime != nil {
		agentCfg.Images, agentCfg.NodeRuntime, agentCfg.LocalBytes = runtime, describeRuntime(runtime, log), localBytes(runtime, log)
	}
	builds, err := agent.New(agentCfg)
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	down.add(builds.Close)

	access, creds, err := newAccess(cfg.Listeners, registry, log)
	if err != nil {
		return err
	}
	srv, err := server.New(server.Config{
		Builds: builds, BuildKit: engine.Proxy(pickEngine(cfg, cluster, node, sandboxes, log)),
		Auth: access, Credentials: creds, Log: log, Metrics: registry, Tracer: tracing.provider,
	})
	if err != nil {
		return err
	}
	return serveAll(ctx, cfg, srv, builds, registry, log)
}

// serveAll opens the listeners and serves until ctx ends or a listener fails. It
// returns when no call is served any more.
func serveAll(ctx context.Context, cfg *config.Agent, srv *server.Server, builds *agent.Agent, registry *prometheus.Registry, log *slog.Logger) error {
	group, gctx := errgroup.WithContext(ctx)
	// The pages outlive ctx: probes and Prometheus see how the agent drains.
	pagesCtx, stopPages := context.WithCancel(context.WithoutCancel(ctx))
	defer stopPages()
	if err := startPages(pagesCtx, group, cfg, builds, registry, log); err != nil {
		stopPages()
		return errors.Join(err, group.Wait())
	}
	listeners, err := listen(ctx, cfg.Listeners)
	if err != nil {
		stopPages()
		return errors.Join(err, group.Wait())
	}
	for _, l := range listeners {
		log.Info("listening", "address", l.Addr().Network()+"://"+l.Addr().String())
	}
	// What the start needed goes back to the node.
	debug.FreeOSMemory()
	group.Go(func() error { return srv.Serve(listeners...) })
	group.Go(func() error {
		<-gctx.Done()
		defer stopPages()
		patience := cfg.Builds.DrainTimeout.Value()
		if ctx.Err() == nil {
			patience = 0 // a listener failed: nobody can follow builds any more
		}
		drain(context.WithoutCancel(ctx), patience, srv, builds, log)
		return nil
	})
	return group.Wait()
}

// drain lets builds end within patience, and then ends the server.
func drain(ctx context.Context, patience time.Duration, srv *server.Server, builds *agent.Agent, log *slog.Logger) {
	wait, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("builds.drainTimeout of %s is over", patience))
	defer cancel()
	var both errgroup.Group
	both.Go(func() error { return srv.Drain(wait) })
	both.Go(func() error { return builds.Drain(wait) })
	if err := both.Wait(); err != nil {
		log.Warn("builds were interrupted", "error", err)
	}
	stop, cancelStop := context.WithTimeout(ctx, stopTimeout)
	defer cancelStop()
	srv.Stop(stop)
	log.Info("the agent has ended")
}

// teardown ends what was started, the last first.
type teardown []func() error

func (t *teardown) add(f func() error) { *t = append(*t, f) }

func (t teardown) run() error {
	var errs []error
	for i := len(t) - 1; i >= 0; i-- {
		errs = append(errs, t[i]())
	}
	return errors.Join(errs...)
}

func lockRoot(ctx context.Context, root string) (func() error, error) {
	wait, cancel := context.WithTimeoutCause(ctx, lockPatience, errors.New("one state directory is for one process; end that one, or choose another root"))
	defer cancel()
	unlock, err := snapshot.Lock(wait, root, nil)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	return unlock, nil
}

func nodeName(cfg *config.Agent) (string, error) {
	host, err := os.Hostname()
	if name := cmp.Or(cfg.NodeName, host); name != "" {
		return name, nil
	}
	return "", fmt.Errorf("find the node's name: %w; set nodeName", err)
}

func newRegistry(node string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "kiln_agent_info", Help: "1, with the agent's version and node.",
		ConstLabels: prometheus.Labels{"version": program.Version(), "node": node},
	})
	info.Set(1)
	reg.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

func constant[T any](v T) func() T { return func() T { return v } }
