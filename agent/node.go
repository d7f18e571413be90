package agent

import (
	"context"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Probe implements agentv1.BuildServiceServer.
func (a *Agent) Probe(ctx context.Context, req *agentv1.ProbeRequest) (*agentv1.ProbeResponse, error) {
	id, err := identityOf(ctx)
	if err != nil {
		return nil, err
	}
	tenant, err := id.TenantFor(req.GetTenant())
	if err != nil {
		return nil, err
	}
	if req.GetSpec() == nil {
		return nil, invalid("spec", "is missing")
	}
	if proto.Size(req.GetSpec()) > maxSpec {
		return nil, invalid("spec", "has %d bytes, %d is the most", proto.Size(req.GetSpec()), maxSpec)
	}
	stats := a.queue.Stats()
	refusals, code := a.refusals(ctx, tenant, req.GetSpec())
	out := &agentv1.ProbeResponse{
		Refusals: refusals, RefusalCode: int32(code),
		Running: int32(stats.Running), Queued: int32(stats.Queued), Slots: int32(a.queue.Limits().Slots),
	}
	out.Runnable = len(out.Refusals) == 0
	if a.cfg.LocalBytes != nil && id.AllTenants() {
		if names := images(req.GetSpec()); len(names) > 0 {
			out.LocalBaseBytes = a.cfg.LocalBytes(ctx, names)
		}
	}
	if scope := req.GetSpec().GetCacheScope(); scope != "" {
		if known, ok := a.records.Scope(tenant, scope); ok {
			out.LocalCacheBytes, out.LastBuiltAt = known.CacheBytes, timestamppb.New(known.LastBuilt)
		}
	}
	return out, nil
}

// message is what an error says, without the code of a status.
func message(err error) string {
	if st, ok := status.FromError(err); ok {
		return st.Message()
	}
	return err.Error()
}

// GetInfo implements agentv1.BuildServiceServer.
func (a *Agent) GetInfo(ctx context.Context, _ *agentv1.GetInfoRequest) (*agentv1.GetInfoResponse, error) {
	if _, err := identityOf(ctx); err != nil {
		return nil, err
	}
	limits := a.queue.Limits()
	out := &agentv1.GetInfoResponse{
		Node: a.cfg.Node, Version: a.cfg.Version, BuildkitVersion: a.cfg.BuildKitVersion,
		Sandboxes: a.cfg.Sandboxes(), Platforms: a.cfg.Platforms,
		Slots: int32(limits.Slots), QueueLimit: int32(limits.Queued), StartedAt: timestamppb.New(a.started),
	}
	if a.cfg.NodeRuntime != nil {
		out.NodeRuntime = a.cfg.NodeRuntime(ctx)
	}
	return out, nil
}
