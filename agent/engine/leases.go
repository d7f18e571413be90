package engine

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/moby/buildkit/cache/metadata"
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

// deleteOrphans deletes the leases of references that have no metadata, which nothing else
// does: a process that is killed between the two leaves one, and what it holds stays on the
// disk. It is for a domain whose engine does not run yet.
func (m domainLeases) deleteOrphans(ctx context.Context, references *metadata.Store) error {
	items, err := references.All()
	if err != nil {
		return fmt.Errorf("list references of %s: %w", m.domain, err)
	}
	known := map[string]bool{}
	for _, item := range items {
		known[item.ID()] = true
	}
	all, err := m.List(ctx)
	if err != nil {
		return fmt.Errorf("list leases of %s: %w", m.domain, err)
	}
	for _, l := range all {
		// A reference has up to three leases; BuildKit's names for the others end so.
		if known[strings.TrimSuffix(strings.TrimSuffix(l.ID, "-view"), "-variants")] {
			continue
		}
		if err := m.Delete(ctx, l); err != nil {
			return fmt.Errorf("delete lease %s of %s: %w", l.ID, m.domain, err)
		}
	}
	return nil
}
