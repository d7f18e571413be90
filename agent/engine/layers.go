package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/containerimage"
	"github.com/moby/buildkit/util/contentutil"
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
// fetched: to unpack so many takes minutes. Of a layout that a client has, it has the layers
// received from their start.
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
		out.name, platform, limit, out.layout = id.Reference.String(), id.Platform, id.LayerLimit, true
	}
	out.some = limit != nil
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
	// some tells that some of its layers are wanted, which are counted when they are
	// unpacked, and layout that it comes from a client.
	some, layout bool
}

// CacheKey implements source.SourceInstance. It is where the manifest is fetched.
func (i countedImage) CacheKey(ctx context.Context, job solver.JobContext, index int) (key, pin string, opts solver.CacheOpts, done bool, err error) {
	key, pin, opts, done, err = i.SourceInstance.CacheKey(ctx, job, index)
	if err != nil {
		return "", "", nil, false, err
	}
	layers, err := i.layers(ctx, pin)
	if n := len(layers); err == nil && n > maxLayers && !i.some {
		err = tooManyLayers("image "+i.name, n, maxLayers)
	}
	if err == nil && i.layout {
		err = i.restart(ctx, layers)
	}
	if err != nil {
		return "", "", nil, false, err
	}
	return key, pin, opts, done, nil
}

// layers returns those of the image that pin names, a manifest or an index.
func (i countedImage) layers(ctx context.Context, pin string) ([]ocispecs.Descriptor, error) {
	desc := ocispecs.Descriptor{Digest: digest.Digest(pin)}
	r, err := i.content.ReaderAt(ctx, desc)
	if errdefs.IsNotFound(err) {
		return nil, nil // it was collected meanwhile, and is fetched again if need be
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
		return nil, fmt.Errorf("count layers of %s: %w", i.name, err)
	}
	return m.Layers, nil
}

// restart forgets the parts of layers that a build had received when it ended. BuildKit goes on
// where they end, which its reader of a client's layout cannot, and the build would fail.
func (i countedImage) restart(ctx context.Context, layers []ocispecs.Descriptor) error {
	ctx = contentutil.RegisterContentPayloadTypes(ctx) // as BuildKit names what it receives
	for _, l := range layers {
		ref := remotes.MakeRefKey(ctx, l)
		if st, err := i.content.Status(ctx, ref); errdefs.IsNotFound(err) || err == nil && st.Offset == 0 {
			continue
		}
		w, err := i.content.Writer(ctx, content.WithRef(ref))
		if errdefs.IsUnavailable(err) {
			continue // another build receives it now
		}
		if err == nil {
			err = errors.Join(w.Truncate(0), w.Close())
		}
		if err != nil {
			return fmt.Errorf("receive layer %s of %s anew: %w", l.Digest, i.name, err)
		}
	}
	return nil
}
