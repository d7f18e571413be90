package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/containerimage"
	"github.com/moby/buildkit/util/imageutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxLayers is how many layers the kernel's overlay takes below the one that is written
// to (its OVL_MAX_STACK).
const maxLayers = 500

func tooManyLayers(what string, n, most int) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s has %d layers, and the kernel mounts %d at most: squash it, or build it with fewer instructions", what, n, most))
}

// boundedSnapshots refuses a snapshot on more layers than can be mounted: whoever uses it
// would learn that from the kernel, after all of them were made.
type boundedSnapshots struct {
	snapshots.Snapshotter
	most int
}

// Prepare implements snapshots.Snapshotter. The store has gone through the layers anyway
// and names them all, so that counting costs nothing more.
func (s boundedSnapshots) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := s.Snapshotter.Prepare(ctx, key, parent, opts...)
	if err != nil {
		return nil, err
	}
	tree, _, err := parseMounts(mounts)
	if n := len(tree.Lower); n > s.most {
		err = tooManyLayers("the file system of this step", n, s.most)
	}
	if err != nil {
		return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	return mounts, nil
}

// countedImages refuses an image of more layers than can be mounted before any of them is
// fetched: to unpack so many takes minutes.
type countedImages struct {
	source.Source
	content content.Store
}

// Resolve implements source.Source.
func (s countedImages) Resolve(ctx context.Context, id source.Identifier, sm *session.Manager, v solver.Vertex) (source.SourceInstance, error) {
	instance, err := s.Source.Resolve(ctx, id, sm, v)
	if err != nil {
		return nil, err
	}
	out := countedImage{SourceInstance: instance, content: s.content, platform: platforms.DefaultSpec()}
	var platform *ocispecs.Platform
	var limit *int
	switch id := id.(type) {
	case *containerimage.ImageIdentifier:
		out.name, platform, limit = id.Reference.String(), id.Platform, id.LayerLimit
	case *containerimage.OCIIdentifier:
		out.name, platform, limit = id.Reference.String(), id.Platform, id.LayerLimit
	}
	if limit != nil {
		return instance, nil // some of its layers, which are counted when they are unpacked
	}
	if platform != nil {
		out.platform = *platform
	}
	return out, nil
}

// countedImage is an image that may have too many layers.
type countedImage struct {
	source.SourceInstance
	content  content.Store
	name     string
	platform ocispecs.Platform
}

// CacheKey implements source.SourceInstance. It is where the manifest is fetched.
func (i countedImage) CacheKey(ctx context.Context, job solver.JobContext, index int) (key, pin string, opts solver.CacheOpts, done bool, err error) {
	key, pin, opts, done, err = i.SourceInstance.CacheKey(ctx, job, index)
	if err != nil {
		return "", "", nil, false, err
	}
	n, err := i.layers(ctx, pin)
	if err == nil && n > maxLayers {
		err = tooManyLayers("image "+i.name, n, maxLayers)
	}
	if err != nil {
		return "", "", nil, false, err
	}
	return key, pin, opts, done, nil
}

// layers counts those of the image that pin names, a manifest or an index.
func (i countedImage) layers(ctx context.Context, pin string) (int, error) {
	desc := ocispecs.Descriptor{Digest: digest.Digest(pin)}
	r, err := i.content.ReaderAt(ctx, desc)
	if errdefs.IsNotFound(err) {
		return 0, nil // it was collected meanwhile, and is fetched again if need be
	}
	if err == nil {
		desc.Size = r.Size()
		desc.MediaType, err = imageutil.DetectManifestMediaType(r)
		err = errors.Join(err, r.Close())
	}
	var m ocispecs.Manifest
	if err == nil {
		m, err = images.Manifest(ctx, i.content, desc, platforms.Only(i.platform))
	}
	if err != nil {
		return 0, fmt.Errorf("count layers of %s: %w", i.name, err)
	}
	return len(m.Layers), nil
}
