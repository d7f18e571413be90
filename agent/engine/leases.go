package engine

import (
	"context"
	"strconv"

	"github.com/containerd/containerd/v2/core/leases"
)

// domainLabel marks the leases of a domain.
const domainLabel = "kiln.build/domain"

// domainLeases shows a domain its own leases only. BuildKit deletes all temporary
// leases that it can list when it starts, and would delete those of builds that
// run in other domains.
type domainLeases struct {
	leases.Manager
	domain string
}

// Create implements leases.Manager.
func (m domainLeases) Create(ctx context.Context, opts ...leases.Opt) (leases.Lease, error) {
	mark := leases.WithLabels(map[string]string{domainLabel: m.domain})
	return m.Manager.Create(ctx, append(opts[:len(opts):len(opts)], mark)...)
}

// List implements leases.Manager.
func (m domainLeases) List(ctx context.Context, filters ...string) ([]leases.Lease, error) {
	own := "labels.\"" + domainLabel + "\"==" + strconv.Quote(m.domain)
	if len(filters) == 0 {
		return m.Manager.List(ctx, own)
	}
	narrowed := make([]string, len(filters))
	for i, f := range filters {
		narrowed[i] = f + "," + own
	}
	return m.Manager.List(ctx, narrowed...)
}
