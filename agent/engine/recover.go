package engine

import (
	"context"
	"fmt"
	"strings"

	"github.com/moby/buildkit/cache/metadata"
)

// equalMutableKey is BuildKit's name for the reference whose snapshot a result shares until
// it is committed.
const equalMutableKey = "cache.equalMutable"

// deleteOrphans deletes the leases that a killed process left, and that nothing else
// deletes: of references that have no metadata yet or no more, and of results that it was
// about to commit. What they hold would stay on the disk. It is for a domain whose engine
// has read its references and does not run yet.
func (m domainLeases) deleteOrphans(ctx context.Context, references *metadata.Store) error {
	items, err := references.All()
	if err != nil {
		return fmt.Errorf("list references of %s: %w", m.domain, err)
	}
	known := map[string]bool{}
	for _, item := range items {
		known[item.ID()] = item.Get(equalMutableKey) == nil
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
