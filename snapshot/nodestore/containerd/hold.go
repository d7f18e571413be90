package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/snapshot/nodestore"
)

// Lend implements nodestore.Node. The hold is a lease on the manifests, which by
// containerd's labels keeps the blobs and snapshots below them.
func (n *Node) Lend(ctx context.Context, image reference.Named) (_ nodestore.Hold, err error) {
	if _, tagged := image.(reference.Tagged); tagged {
		return nil, fmt.Errorf("lend %s: want a digest in place of the tag, or neither: %w", image, errdefs.ErrInvalidArgument)
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	roots, err := n.roots(ctx, image)
	if err != nil {
		return nil, err
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("lend %s: the node has no such image: %w", image, errdefs.ErrNotFound)
	}
	_, lease, err := n.newLease(ctx)
	if err != nil {
		return nil, err
	}
	h := &hold{node: n, image: image.String(), lease: lease, tree: newTree(), store: n.client.ContentStore(), layers: map[digest.Digest][]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Release(ctx))
		}
	}()
	for _, root := range roots {
		// What is held first and then found cannot be collected in between.
		if err := n.client.LeasesService().AddResource(ctx, lease, leases.Resource{ID: root.Digest.String(), Type: "content"}); err != nil {
			return nil, n.failed("hold "+root.Digest.String(), err)
		}
		if _, err := h.store.Info(ctx, root.Digest); err != nil {
			return nil, n.failed("find manifest "+root.Digest.String(), err)
		}
		if err := h.tree.add(ctx, h.store, root); err != nil {
			return nil, n.failed("lend "+image.String(), err)
		}
	}
	return h, nil
}

// roots returns the index or manifest of each image that the node knows by the
// name's repository, or of the one with the name's digest.
func (n *Node) roots(ctx context.Context, image reference.Named) ([]ocispecs.Descriptor, error) {
	pattern := "^" + regexp.QuoteMeta(image.Name()) + "[:@]"
	found, err := n.client.ImageService().List(ctx, "name~="+strconv.Quote(pattern))
	if err != nil {
		return nil, n.failed("list the images of "+image.Name(), err)
	}
	canonical, narrowed := image.(reference.Canonical)
	roots := map[digest.Digest]ocispecs.Descriptor{}
	for _, img := range found {
		if !narrowed || img.Target.Digest == canonical.Digest() {
			roots[img.Target.Digest] = img.Target
			continue
		}
		below := newTree()
		if err := below.add(ctx, n.client.ContentStore(), img.Target); err != nil {
			return nil, n.failed("read image "+img.Name, err)
		}
		if desc, ok := below.blobs[canonical.Digest()]; ok && (images.IsManifestType(desc.MediaType) || images.IsIndexType(desc.MediaType)) {
			roots[desc.Digest] = desc
		}
	}
	out := make([]ocispecs.Descriptor, 0, len(roots))
	for _, desc := range roots {
		out = append(out, desc)
	}
	return out, nil
}

// hold implements nodestore.Hold by a lease.
type hold struct {
	node  *Node
	image string
	lease leases.Lease
	tree  *tree
	store content.Store

	mu sync.Mutex
	// layers has the directories of the chains that were asked for; mu guards it.
	layers map[digest.Digest][]string
	// views are the snapshots that were made for it; mu guards it.
	views []string
	// released is set by Release; mu guards it.
	released bool
}

// Info implements content.InfoProvider.
func (h *hold) Info(ctx context.Context, blob digest.Digest) (content.Info, error) {
	if err := h.has(blob); err != nil {
		return content.Info{}, err
	}
	info, err := h.store.Info(h.context(ctx), blob)
	if err != nil {
		return content.Info{}, h.node.failed("find blob "+blob.String(), err)
	}
	return info, nil
}

// ReaderAt implements content.Provider.
func (h *hold) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if err := h.has(desc.Digest); err != nil {
		return nil, err
	}
	ra, err := h.store.ReaderAt(h.context(ctx), ocispecs.Descriptor{Digest: desc.Digest})
	if err != nil {
		return nil, h.node.failed("read blob "+desc.Digest.String(), err)
	}
	return ra, nil
}

func (h *hold) has(blob digest.Digest) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released {
		return fmt.Errorf("hold of %s is released: %w", h.image, errdefs.ErrFailedPrecondition)
	}
	if _, ok := h.tree.blobs[blob]; !ok {
		return fmt.Errorf("blob %s is no part of %s on this node: %w", blob, h.image, errdefs.ErrNotFound)
	}
	return nil
}

// context returns ctx for calls whose results the hold is to keep.
func (h *hold) context(ctx context.Context) context.Context {
	return leases.WithLease(namespaces.WithNamespace(ctx, namespace), h.lease.ID)
}

// Layers implements nodestore.Hold.
func (h *hold) Layers(ctx context.Context, chainID digest.Digest) ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released {
		return nil, fmt.Errorf("hold of %s is released: %w", h.image, errdefs.ErrFailedPrecondition)
	}
	if dirs, ok := h.layers[chainID]; ok {
		return slices.Clone(dirs), nil
	}
	ctx = h.context(ctx)
	chains, err := h.tree.chains(ctx, h.store)
	if err != nil {
		return nil, h.node.failed("read the images of "+h.image, err)
	}
	if _, ok := chains[chainID]; !ok {
		return nil, fmt.Errorf("layers %s are no part of %s on this node: %w", chainID, h.image, errdefs.ErrNotFound)
	}
	sn := h.node.client.SnapshotService(h.node.snapshotter)
	key := h.lease.ID + "-" + chainID.Encoded()
	mounts, err := sn.View(ctx, key, chainID.String(), snapshots.WithLabels(map[string]string{labelOwner: h.node.owner}))
	if err != nil {
		return nil, h.node.failed("view layers "+chainID.String(), err)
	}
	h.views = append(h.views, key)
	dirs, err := directories(mounts)
	if err != nil {
		return nil, h.node.failed("view layers "+chainID.String()+" of snapshotter "+h.node.snapshotter, err)
	}
	for _, dir := range dirs {
		if _, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("find layer of %s: %w; give this process containerd's root directory at the same path: %w", h.image, err, errdefs.ErrFailedPrecondition)
		}
	}
	h.layers[chainID] = dirs
	return slices.Clone(dirs), nil
}

// directories returns what the mounts of a read-only snapshot are made of, topmost
// first.
func directories(mounts []mount.Mount) ([]string, error) {
	if len(mounts) != 1 {
		return nil, fmt.Errorf("%d mounts, not one: %w", len(mounts), errdefs.ErrNotImplemented)
	}
	switch m := mounts[0]; m.Type {
	case "bind":
		return []string{m.Source}, nil
	case "overlay":
		for _, option := range m.Options {
			if lower, ok := strings.CutPrefix(option, "lowerdir="); ok {
				return strings.Split(lower, ":"), nil
			}
		}
		return nil, fmt.Errorf("overlay without lower directories: %w", errdefs.ErrNotImplemented)
	default:
		return nil, fmt.Errorf("layers are mounts of type %s, not directories: %w", m.Type, errdefs.ErrNotImplemented)
	}
}

// Release implements nodestore.Hold.
func (h *hold) Release(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released {
		return nil
	}
	h.released = true
	ctx = namespaces.WithNamespace(ctx, namespace)
	sn := h.node.client.SnapshotService(h.node.snapshotter)
	var errs []error
	for _, key := range h.views {
		errs = append(errs, h.node.removeView(ctx, sn, key))
	}
	return errors.Join(append(errs, h.node.deleteLease(ctx, h.lease, false))...)
}
