package engine

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// domainSnapshots are the snapshots of the build store that a domain has made. A
// layer's snapshot has a name that follows from its content, so two domains with
// the same layer make the same one: the second makes it from the bytes that it has
// brought, and then the store keeps the one that is there. Until then the name
// gets it nothing, as with blobs (domainContent).
type domainSnapshots struct {
	snapshots.Snapshotter
	// label marks a snapshot as one that the domain has made.
	label string
}

func newDomainSnapshots(s snapshots.Snapshotter, d Domain) *domainSnapshots {
	return &domainSnapshots{Snapshotter: s, label: "kiln.build/snapshot." + d.key()}
}

// mark labels a new snapshot.
func (s *domainSnapshots) mark(opts []snapshots.Opt) []snapshots.Opt {
	return append(opts[:len(opts):len(opts)], snapshots.WithLabels(map[string]string{s.label: had}))
}

// Stat implements snapshots.Snapshotter.
func (s *domainSnapshots) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	info, err := s.Snapshotter.Stat(ctx, key)
	if err != nil {
		return snapshots.Info{}, err
	}
	if _, ok := info.Labels[s.label]; !ok {
		return snapshots.Info{}, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	return info, nil
}

// Update implements snapshots.Snapshotter.
func (s *domainSnapshots) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	now, err := s.Stat(ctx, info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	if len(fieldpaths) == 0 {
		// Labels that are not named stay: they may be other domains'.
		for k, v := range info.Labels {
			now.Labels[k] = v
		}
		info.Labels = now.Labels
	}
	return s.Snapshotter.Update(ctx, info, fieldpaths...)
}

// Usage implements snapshots.Snapshotter.
func (s *domainSnapshots) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	if _, err := s.Stat(ctx, key); err != nil {
		return snapshots.Usage{}, err
	}
	return s.Snapshotter.Usage(ctx, key)
}

// Mounts implements snapshots.Snapshotter.
func (s *domainSnapshots) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	if _, err := s.Stat(ctx, key); err != nil {
		return nil, err
	}
	return s.Snapshotter.Mounts(ctx, key)
}

// Prepare implements snapshots.Snapshotter.
func (s *domainSnapshots) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if err := s.visible(ctx, parent); err != nil {
		return nil, err
	}
	return s.Snapshotter.Prepare(ctx, key, parent, s.mark(opts)...)
}

// View implements snapshots.Snapshotter.
func (s *domainSnapshots) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if err := s.visible(ctx, parent); err != nil {
		return nil, err
	}
	mounts, err := s.Snapshotter.View(ctx, key, parent, s.mark(opts)...)
	if !errdefs.IsAlreadyExists(err) {
		return mounts, err
	}
	// BuildKit names views after what they show, and uses one that is there. Another
	// domain's view of what this one may see is as good as its own.
	info, serr := s.Snapshotter.Stat(ctx, key)
	if serr != nil || info.Kind != snapshots.KindView || info.Parent != parent {
		return nil, err
	}
	if uerr := s.markExisting(ctx, key); uerr != nil {
		return nil, uerr
	}
	return nil, err
}

// markExisting labels a snapshot that another domain has made too.
func (s *domainSnapshots) markExisting(ctx context.Context, name string) error {
	info := snapshots.Info{Name: name, Labels: map[string]string{s.label: had}}
	if _, err := s.Snapshotter.Update(ctx, info, "labels."+s.label); err != nil {
		return fmt.Errorf("mark snapshot %s: %w", name, err)
	}
	return nil
}

func (s *domainSnapshots) visible(ctx context.Context, parent string) error {
	if parent == "" {
		return nil
	}
	_, err := s.Stat(ctx, parent)
	return err
}

// Commit implements snapshots.Snapshotter. The caller has checked that what it
// commits under a name that follows from its content has that content; so it has
// the one that is there already.
func (s *domainSnapshots) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	if _, err := s.Stat(ctx, key); err != nil {
		return err
	}
	err := s.Snapshotter.Commit(ctx, name, key, s.mark(opts)...)
	if !errdefs.IsAlreadyExists(err) {
		return err
	}
	if uerr := s.markExisting(ctx, name); uerr != nil {
		return uerr
	}
	return err
}

// Remove implements snapshots.Snapshotter.
func (s *domainSnapshots) Remove(ctx context.Context, key string) error {
	if _, err := s.Stat(ctx, key); err != nil {
		return err
	}
	return s.Snapshotter.Remove(ctx, key)
}

// Walk implements snapshots.Snapshotter.
func (s *domainSnapshots) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.Snapshotter.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		if _, ok := info.Labels[s.label]; !ok {
			return nil
		}
		return fn(ctx, info)
	}, filters...)
}

// snapshotsOf returns the snapshots that a domain may use. The only user of a store
// has it for itself.
func (n *Node) snapshotsOf(d Domain) snapshots.Snapshotter {
	all := boundedSnapshots{n.store.Snapshots(), maxLayers}
	if d.Tenant == "" {
		return all
	}
	return newDomainSnapshots(all, d)
}
