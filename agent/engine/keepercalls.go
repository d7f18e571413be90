package engine

import (
	"context"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc"
)

// intercept tells the keeper of builds, and clients that ask for workers which rules
// it keeps: BuildKit knows none. It is a grpc.UnaryServerInterceptor.
func (k *keeper) intercept(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	switch req.(type) {
	case *controlapi.SolveRequest:
		if err := k.begin(ctx); err != nil {
			return nil, err
		}
		defer k.end()
	case *controlapi.ListWorkersRequest:
		resp, err := next(ctx, req)
		if list, ok := resp.(*controlapi.ListWorkersResponse); ok && err == nil {
			for _, w := range list.GetRecord() {
				w.GCPolicy = k.rules()
			}
		}
		return resp, err
	}
	return next(ctx, req)
}

// interceptStream has what prunes the cache commit as builds do. It is a
// grpc.StreamServerInterceptor.
func (k *keeper) interceptStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if info.FullMethod == controlapi.Control_Prune_FullMethodName {
		k.deferred.Begin()
		defer k.deferred.End()
	}
	return next(srv, ss)
}

// rules returns the policy as BuildKit's API has it.
func (k *keeper) rules() []*apitypes.GCPolicy {
	out := make([]*apitypes.GCPolicy, len(k.policy))
	for i, p := range k.policy {
		out[i] = &apitypes.GCPolicy{
			All: p.All, Filters: p.Filter, KeepDuration: int64(p.KeepDuration),
			ReservedSpace: p.ReservedSpace, MaxUsedSpace: p.MaxUsedSpace, MinFreeSpace: p.MinFreeSpace,
		}
	}
	return out
}
