package engine

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	bksnapshot "github.com/moby/buildkit/snapshot"

	"github.com/kiln-build/kiln/sandbox/stepfs"
)

// volatileSnapshotter has BuildKit mount writable snapshots, to copy files into them, as steps
// have theirs: volatile. Else the kernel writes the whole file system to disk when such a mount
// goes, with all that others have written, and the build waits for it. Layers reach the disk
// when the databases that speak of them do; see snapshot.DeferredSync.
type volatileSnapshotter struct{ bksnapshot.Snapshotter }

// Mounts implements bksnapshot.Snapshotter.
func (s volatileSnapshotter) Mounts(ctx context.Context, key string) (bksnapshot.Mountable, error) {
	m, err := s.Snapshotter.Mounts(ctx, key)
	if err != nil {
		return nil, err
	}
	return volatileMountable{m}, nil
}

// View implements bksnapshot.Snapshotter.
func (s volatileSnapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) (bksnapshot.Mountable, error) {
	m, err := s.Snapshotter.View(ctx, key, parent, opts...)
	if err != nil {
		return nil, err
	}
	return volatileMountable{m}, nil
}

type volatileMountable struct{ bksnapshot.Mountable }

// Mount implements bksnapshot.Mountable. The release makes the snapshot fit for another mount.
func (m volatileMountable) Mount() ([]mount.Mount, func() error, error) {
	mounts, release, err := m.Mountable.Mount()
	if err != nil {
		return nil, nil, err
	}
	mounts = slices.Clone(mounts)
	var works []string
	for i, mnt := range mounts {
		if mnt.Type != "overlay" {
			continue
		}
		for _, o := range mnt.Options {
			if work, ok := strings.CutPrefix(o, "workdir="); ok {
				works = append(works, work)
				mounts[i].Options = append(slices.Clone(mnt.Options), "volatile")
			}
		}
	}
	return mounts, func() error {
		var errs []error
		if release != nil {
			errs = append(errs, release())
		}
		for _, work := range works {
			errs = append(errs, stepfs.ClearVolatile(work))
		}
		return errors.Join(errs...)
	}, nil
}
