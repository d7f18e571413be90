package containerd

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bytes implements nodestore.Node. Layers whose blobs containerd has discarded do not
// count, as they are not lent.
func (n *Node) Bytes(ctx context.Context, image reference.Named) (int64, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	target, err := n.target(ctx, reference.TagNameOnly(image))
	if errdefs.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	manifest, err := images.Manifest(ctx, documents{n.client.ContentStore()}, plain(target), platforms.Default())
	if errdefs.IsNotFound(err) {
		return 0, nil // the node has it for another platform, or not all of it
	}
	if err != nil {
		return 0, n.failed("read the manifest of "+image.String(), err)
	}
	if len(manifest.Layers) >= maxDescriptors {
		return 0, fmt.Errorf("image %s has more than %d blobs: %w", image, maxDescriptors, errdefs.ErrInvalidArgument)
	}
	blobs := []digest.Digest{manifest.Config.Digest}
	for _, layer := range manifest.Layers {
		blobs = append(blobs, layer.Digest)
	}
	has, err := n.Probe(ctx, blobs...)
	if err != nil {
		return 0, err
	}
	var size int64
	for _, blob := range has {
		size += blob
	}
	return size, nil
}

// target returns the index or manifest of an image by its tag or digest.
func (n *Node) target(ctx context.Context, image reference.Named) (ocispecs.Descriptor, error) {
	if _, ok := image.(reference.Canonical); ok {
		roots, err := n.roots(ctx, image)
		if err != nil {
			return ocispecs.Descriptor{}, err
		}
		if len(roots) == 0 {
			return ocispecs.Descriptor{}, fmt.Errorf("find image %s: %w", image, errdefs.ErrNotFound)
		}
		return roots[0], nil
	}
	img, err := n.client.ImageService().Get(ctx, image.String())
	if err != nil {
		return ocispecs.Descriptor{}, n.failed("find image "+image.String(), err)
	}
	return img.Target, nil
}
