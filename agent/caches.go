package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/moby/buildkit/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// domains returns those of a tenant, or all for "".
func (a *Agent) domains(ctx context.Context, tenant string) ([]Domain, error) {
	all, err := a.cfg.Engines.Domains(ctx)
	if err != nil {
		return nil, fmt.Errorf("list caches: %w", err)
	}
	if tenant != "" {
		all = slices.DeleteFunc(all, func(d Domain) bool { return d.Tenant != tenant })
	}
	slices.SortFunc(all, func(a, b Domain) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Sandbox, b.Sandbox))
	})
	return all, nil
}

// each calls do with a session for each of a tenant's domains.
func (a *Agent) each(ctx context.Context, tenant string, do func(Domain, Session) error) error {
	all, err := a.domains(ctx, tenant)
	if err != nil {
		return err
	}
	for _, d := range all {
		if err := a.with(ctx, d, do); err != nil {
			return fmt.Errorf("cache of tenant %s in sandbox %s: %w", d.Tenant, d.Sandbox, err)
		}
	}
	return nil
}

func (a *Agent) with(ctx context.Context, d Domain, do func(Domain, Session) error) error {
	session, err := a.cfg.Engines.Open(ctx, d)
	if err != nil {
		return err
	}
	defer func() {
		if err := session.Close(); err != nil {
			a.cfg.Logger.Error("cannot close a session with the engine", "tenant", d.Tenant, "error", err)
		}
	}()
	return do(d, session)
}

// DiskUsage implements agentv1.BuildServiceServer.
func (a *Agent) DiskUsage(ctx context.Context, req *agentv1.DiskUsageRequest) (*agentv1.DiskUsageResponse, error) {
	tenant, err := tenantsFor(ctx, req.GetTenant())
	if err != nil {
		return nil, err
	}
	out := &agentv1.DiskUsageResponse{}
	if out.DiskSize, out.DiskFree, err = a.disk(); err != nil {
		return nil, statusOf(err)
	}
	err = a.each(ctx, tenant, func(d Domain, s Session) error {
		usage, err := s.DiskUsage(ctx)
		if err != nil {
			return err
		}
		c := &agentv1.CacheUsage{Tenant: d.Tenant, Sandbox: sandboxClass(string(d.Sandbox)), Records: int64(len(usage))}
		for _, u := range usage {
			c.Size += u.Size
			if !u.InUse && !u.Shared {
				c.Reclaimable += u.Size
			}
		}
		out.Caches = append(out.Caches, c)
		return nil
	})
	if err != nil {
		return nil, statusOf(err)
	}
	return out, nil
}

// Prune implements agentv1.BuildServiceServer. keep_bytes holds for each cache.
func (a *Agent) Prune(ctx context.Context, req *agentv1.PruneRequest) (*agentv1.PruneResponse, error) {
	tenant, err := tenantsFor(ctx, req.GetTenant())
	if err != nil {
		return nil, err
	}
	if d := req.GetKeepDuration(); d != nil && (d.CheckValid() != nil || d.AsDuration() < 0) {
		return nil, invalid("keep_duration", "want a duration of 0 or more")
	}
	if req.GetKeepBytes() < 0 {
		return nil, invalid("keep_bytes", "want 0 or more")
	}
	opts := []client.PruneOption{client.WithKeepOpt(req.GetKeepDuration().AsDuration(), req.GetKeepBytes(), 0, 0)}
	if req.GetAll() {
		opts = append(opts, client.PruneAll)
	}
	out := &agentv1.PruneResponse{}
	err = a.each(ctx, tenant, func(_ Domain, s Session) error { return prune(ctx, s, opts, out) })
	if err != nil {
		return nil, statusOf(err)
	}
	return out, nil
}

// prune removes from one cache and adds what it freed to out.
func prune(ctx context.Context, s Session, opts []client.PruneOption, out *agentv1.PruneResponse) error {
	removed, done := make(chan client.UsageInfo), make(chan struct{})
	go func() {
		defer close(done)
		for u := range removed {
			out.Freed += u.Size
			out.Records++
		}
	}()
	err := s.Prune(ctx, removed, opts...)
	close(removed)
	<-done
	return err
}
