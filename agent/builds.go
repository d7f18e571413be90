package agent

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kiln-build/kiln/agent/auth"
	"github.com/kiln-build/kiln/agent/failure"
	"github.com/kiln-build/kiln/agent/record"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	defaultPage = 100
	maxPage     = 1000
	// pageBytes keeps a page below what gRPC's clients accept by default.
	pageBytes = 2 << 20
	// maxReason bounds the reason of a cancel, in bytes.
	maxReason = 1024
	// maxSelectors bounds states and labels of a list.
	maxSelectors = 64
)

// identityOf returns who calls.
func identityOf(ctx context.Context) (auth.Identity, error) {
	id, ok := auth.FromContext(ctx)
	if !ok {
		return auth.Identity{}, ruled(codes.Unauthenticated, "NO_IDENTITY", "", "the caller is not known")
	}
	return id, nil
}

// tenantFor returns the tenant of a call that names requested.
func tenantFor(ctx context.Context, requested string) (string, error) {
	id, err := identityOf(ctx)
	if err != nil {
		return "", err
	}
	return id.TenantFor(requested)
}

// tenantsFor is tenantFor for calls that a caller who may act for all tenants makes
// for all of them by naming none: then it returns "".
func tenantsFor(ctx context.Context, requested string) (string, error) {
	id, err := identityOf(ctx)
	if err != nil {
		return "", err
	}
	if requested == "" && id.AllTenants() {
		return "", nil
	}
	return id.TenantFor(requested)
}

// keyFor returns the build that a call is about. One whose ID cannot be is none.
func keyFor(ctx context.Context, tenant, id string) (record.Key, error) {
	tenant, err := tenantFor(ctx, tenant)
	if err != nil {
		return record.Key{}, err
	}
	if err := record.ValidateID(id); err != nil {
		return record.Key{}, invalid("build_id", "%v", err)
	}
	return record.Key{Tenant: tenant, ID: id}, nil
}

// recordError makes a status of an error about a build.
func recordError(key record.Key, err error) error {
	if errors.Is(err, record.ErrNotFound) {
		return notFound(key.ID)
	}
	return statusOf(err)
}

// GetBuild implements agentv1.BuildServiceServer.
func (a *Agent) GetBuild(ctx context.Context, req *agentv1.GetBuildRequest) (*agentv1.GetBuildResponse, error) {
	key, err := keyFor(ctx, req.GetTenant(), req.GetBuildId())
	if err != nil {
		return nil, err
	}
	b, err := a.records.Get(key)
	if err != nil {
		return nil, recordError(key, err)
	}
	return &agentv1.GetBuildResponse{Build: b}, nil
}

// ListBuilds implements agentv1.BuildServiceServer. A page ends before it has
// page_size builds when it would be too large for a message.
func (a *Agent) ListBuilds(ctx context.Context, req *agentv1.ListBuildsRequest) (*agentv1.ListBuildsResponse, error) {
	tenant, err := tenantsFor(ctx, req.GetTenant())
	if err != nil {
		return nil, err
	}
	size := int(req.GetPageSize())
	switch {
	case size < 0 || size > maxPage:
		return nil, invalid("page_size", "want 0 to %d, not %d", maxPage, size)
	case size == 0:
		size = defaultPage
	}
	if len(req.GetStates()) > maxSelectors || len(req.GetLabels()) > maxSelectors {
		return nil, invalid("labels", "want at most %d states and labels", maxSelectors)
	}
	for i, s := range req.GetStates() {
		if _, known := agentv1.BuildState_name[int32(s)]; !known || s == 0 {
			return nil, invalid(field("states", i), "%d is no state of a build", int32(s))
		}
	}
	page, next, err := a.records.List(record.Query{
		Tenant: tenant, States: req.GetStates(), Labels: req.GetLabels(),
		PageSize: size, PageBytes: pageBytes, PageToken: req.GetPageToken(),
	})
	if err != nil {
		return nil, statusOf(err)
	}
	return &agentv1.ListBuildsResponse{Builds: page, NextPageToken: next}, nil
}

// WatchBuild implements agentv1.BuildServiceServer.
func (a *Agent) WatchBuild(req *agentv1.WatchBuildRequest, stream grpc.ServerStreamingServer[agentv1.WatchBuildResponse]) error {
	ctx := stream.Context()
	key, err := keyFor(ctx, req.GetTenant(), req.GetBuildId())
	if err != nil {
		return err
	}
	cursor, err := a.records.Watch(key, req.GetOffset())
	if err != nil {
		return recordError(key, err)
	}
	defer cursor.Close()
	for {
		ev, err := cursor.Next(ctx, !req.GetNoFollow())
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return statusOf(err)
		}
		if err := stream.Send(&agentv1.WatchBuildResponse{Event: ev}); err != nil {
			return err
		}
	}
}

// CancelBuild implements agentv1.BuildServiceServer.
func (a *Agent) CancelBuild(ctx context.Context, req *agentv1.CancelBuildRequest) (*agentv1.CancelBuildResponse, error) {
	key, err := keyFor(ctx, req.GetTenant(), req.GetBuildId())
	if err != nil {
		return nil, err
	}
	if len(req.GetReason()) > maxReason {
		return nil, invalid("reason", "has %d bytes, %d is the most", len(req.GetReason()), maxReason)
	}
	// Its source may still be arriving, of which there is no record.
	a.uploads.Forget(key.Tenant, key.ID)
	a.mu.Lock()
	j := a.jobs[key]
	a.mu.Unlock()
	if j != nil {
		j.cancel(&failure.Cancelled{Reason: req.GetReason()})
	}
	b, err := a.records.Get(key)
	if err != nil {
		return nil, recordError(key, err)
	}
	if j == nil && b.GetResult() == nil {
		// StartBuild has stored it and not returned yet, or its end is being stored.
		return nil, ruled(codes.Unavailable, "BUILD_BETWEEN_STATES", key.ID, "the build is just being started or ended; try again")
	}
	return &agentv1.CancelBuildResponse{Build: b}, nil
}
