package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/snapshot/nodestore"
)

// Receive implements nodestore.Node. The blobs are copied and unpacked under a
// lease; the names, which make the image visible, come last.
func (n *Node) Receive(ctx context.Context, image nodestore.Image) (_ digest.Digest, err error) {
	target := plain(image.Target)
	if err := checkImage(image.Name, target); err != nil {
		return "", err
	}
	// The content is the caller's: it is read in the caller's namespace.
	own := ctx
	read := func(desc ocispecs.Descriptor) (content.ReaderAt, error) { return image.Content.ReaderAt(own, desc) }
	ctx, lease, err := n.newLease(ctx)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		err = errors.Join(err, n.deleteLease(ctx, lease, err != nil))
	}()

	if err := n.copyTree(ctx, read, target, lease.ID); err != nil {
		return "", fmt.Errorf("receive %s: %w", image.Name, err)
	}
	unpacked := ctd.NewImageWithPlatform(n.client, images.Image{Name: image.Name.String(), Target: target}, platforms.Default())
	config, err := unpacked.Config(ctx)
	if err != nil {
		return "", fmt.Errorf("receive %s: %w", image.Name, n.failed("find the configuration", err))
	}
	if err := unpacked.Unpack(ctx, n.snapshotter); err != nil {
		return "", fmt.Errorf("receive %s: %w", image.Name, n.failed("unpack", err))
	}
	if err := n.name(ctx, image.Name, target, config.Digest); err != nil {
		return "", fmt.Errorf("receive %s: %w", image.Name, err)
	}
	return config.Digest, nil
}

// checkImage refuses a name that is none of the kubelet's, and a target that is no
// image or not the named one.
func checkImage(name reference.Named, target ocispecs.Descriptor) error {
	if name == nil {
		return fmt.Errorf("receive image: no name: %w", errdefs.ErrInvalidArgument)
	}
	full, err := nodestore.ParseName(name.String())
	if err != nil {
		return fmt.Errorf("receive image: %w", err)
	}
	if full.String() != name.String() {
		return fmt.Errorf("receive %s: the full name is %s: %w", name, full, errdefs.ErrInvalidArgument)
	}
	if err := checkDescriptor(target); err != nil {
		return fmt.Errorf("receive %s: %w", name, err)
	}
	if canonical, ok := full.(reference.Canonical); ok && canonical.Digest() != target.Digest {
		return fmt.Errorf("receive %s: the image is %s: %w", name, target.Digest, errdefs.ErrInvalidArgument)
	}
	if !images.IsManifestType(target.MediaType) && !images.IsIndexType(target.MediaType) {
		return fmt.Errorf("receive %s: media type %q is no image: %w", name, target.MediaType, errdefs.ErrInvalidArgument)
	}
	return nil
}

// reader opens a blob of the built image.
type reader func(ocispecs.Descriptor) (content.ReaderAt, error)

// copyTree copies target and the image below it that is for this node into
// containerd's content store, with the labels that keep a child while its parent
// stays.
func (n *Node) copyTree(ctx context.Context, read reader, target ocispecs.Descriptor, lease string) error {
	store := n.client.ContentStore()
	matcher := platforms.Default()
	children := images.LimitManifests(images.FilterPlatforms(childrenOf(store), matcher), matcher, 1)
	labelled := images.SetChildrenLabels(store, children)
	next := []ocispecs.Descriptor{target}
	seen := map[digest.Digest]struct{}{}
	for len(next) > 0 {
		var desc ocispecs.Descriptor
		desc, next = next[0], next[1:]
		if _, ok := seen[desc.Digest]; ok {
			continue
		}
		if err := checkDescriptor(desc); err != nil {
			return err
		}
		if len(seen) >= maxDescriptors {
			return fmt.Errorf("image has more than %d blobs: %w", maxDescriptors, errdefs.ErrInvalidArgument)
		}
		seen[desc.Digest] = struct{}{}
		if err := n.copyBlob(ctx, store, read, plain(desc), lease); err != nil {
			return err
		}
		below, err := labelled(ctx, desc)
		if err != nil {
			return fmt.Errorf("read manifest %s: %w", desc.Digest, err)
		}
		next = append(next, below...)
	}
	return nil
}

// childrenOf returns what an index or a manifest refers to. Other blobs, whatever
// they hold, refer to nothing.
func childrenOf(store content.Store) images.HandlerFunc {
	return func(ctx context.Context, desc ocispecs.Descriptor) ([]ocispecs.Descriptor, error) {
		if !images.IsManifestType(desc.MediaType) && !images.IsIndexType(desc.MediaType) {
			return nil, nil
		}
		below, err := images.Children(ctx, documents{store}, plain(desc))
		if err != nil {
			return nil, err
		}
		for _, child := range below {
			if err := checkDescriptor(child); err != nil {
				return nil, err
			}
		}
		return below, nil
	}
}

// copyBlob copies one blob. Errors name it.
func (n *Node) copyBlob(ctx context.Context, store content.Store, read reader, desc ocispecs.Descriptor, lease string) (err error) {
	ref := lease + "-" + desc.Digest.String()
	w, err := content.OpenWriter(ctx, store, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return n.checkSize(ctx, store, desc)
	}
	if err != nil {
		return n.failed("write blob "+desc.Digest.String(), err)
	}
	defer w.Close()
	ra, err := read(desc)
	if err != nil {
		return fmt.Errorf("read blob %s of the built image: %w", desc.Digest, err)
	}
	defer ra.Close()
	if ra.Size() != desc.Size {
		return fmt.Errorf("read blob %s of the built image: its size is %d, and its manifest says %d: %w", desc.Digest, ra.Size(), desc.Size, errdefs.ErrInvalidArgument)
	}
	if err := content.Copy(ctx, w, io.NewSectionReader(ra, 0, desc.Size), desc.Size, desc.Digest); err != nil {
		return n.failed("copy blob "+desc.Digest.String(), err)
	}
	return nil
}

// checkSize refuses a manifest that lies about a blob which the node has already.
func (n *Node) checkSize(ctx context.Context, store content.Store, desc ocispecs.Descriptor) error {
	info, err := store.Info(ctx, desc.Digest)
	if err != nil {
		return n.failed("find blob "+desc.Digest.String(), err)
	}
	if info.Size != desc.Size {
		return fmt.Errorf("blob %s: its size is %d, and its manifest says %d: %w", desc.Digest, info.Size, desc.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}
