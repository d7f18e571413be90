package containerd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels of images that the CRI of containerd understands, and one of kiln's that
// tells where an image came from.
const (
	labelManaged, managed = "io.cri-containerd.image", "managed"
	labelPinned, pinned   = "io.cri-containerd.pinned", "pinned"
	labelReceived         = "kiln.build/received-by"
)

// The CRI learns of new names by events. It is asked again after criPoll until
// criTimeout has passed.
const (
	criPoll    = 10 * time.Millisecond
	criTimeout = 15 * time.Second
)

// name gives an unpacked image its names: its ID, the name that Pods use, and the
// name with its digest, as the CRI does for an image that it pulls. It returns when
// the CRI shows the image. On an error the names are what they were.
func (n *Node) name(ctx context.Context, name reference.Named, target ocispecs.Descriptor, id digest.Digest) (err error) {
	n.naming.Lock()
	defer n.naming.Unlock()

	canonical, err := reference.WithDigest(reference.TrimNamed(name), target.Digest)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	names := []string{id.String(), canonical.String()}
	if s := name.String(); s != canonical.String() {
		names = append(names, s)
	}
	var undo []func(context.Context) error
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.WithoutCancel(ctx), namespace), undoTimeout)
		defer cancel()
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i](ctx))
		}
	}()
	for _, name := range names {
		back, err := n.setName(ctx, name, target)
		if err != nil {
			return err
		}
		undo = append(undo, back)
	}
	return n.waitForCRI(ctx, name.String(), target, id)
}

// setName makes name mean target, and returns what takes that back.
func (n *Node) setName(ctx context.Context, name string, target ocispecs.Descriptor) (undo func(context.Context) error, err error) {
	store := n.client.ImageService()
	img := images.Image{Name: name, Target: target, Labels: map[string]string{labelManaged: managed, labelReceived: n.owner}}
	_, err = store.Create(ctx, img)
	if err == nil {
		return func(ctx context.Context) error {
			err := store.Delete(ctx, name, images.DeleteTarget(&target))
			if err != nil && !errdefs.IsNotFound(err) {
				return n.failed("delete image "+name, err)
			}
			return nil
		}, nil
	}
	if !errdefs.IsAlreadyExists(err) {
		return nil, n.failed("create image "+name, err)
	}
	old, err := store.Get(ctx, name)
	if err != nil {
		return nil, n.failed("find image "+name, err)
	}
	if old.Target.Digest == target.Digest && old.Labels[labelManaged] == managed {
		return func(context.Context) error { return nil }, nil
	}
	if old.Labels[labelPinned] == pinned {
		return nil, fmt.Errorf("image %s is pinned by the runtime and is not replaced: %w", name, errdefs.ErrFailedPrecondition)
	}
	if _, err := store.Update(ctx, img, "target", "labels."+labelManaged, "labels."+labelReceived); err != nil {
		return nil, n.failed("replace image "+name, err)
	}
	return func(ctx context.Context) error {
		now, err := store.Get(ctx, name)
		if err != nil || now.Target.Digest != target.Digest {
			return nil // someone else has changed it since
		}
		if _, err := store.Update(ctx, old); err != nil {
			return n.failed("restore image "+name, err)
		}
		return nil
	}, nil
}

// waitForCRI returns when the kubelet would find the image by its name.
func (n *Node) waitForCRI(ctx context.Context, name string, target ocispecs.Descriptor, id digest.Digest) error {
	ctx, cancel := context.WithTimeoutCause(ctx, criTimeout, fmt.Errorf("containerd's CRI does not show the image after %s", criTimeout))
	defer cancel()
	for {
		resp, err := n.images.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: name}})
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return n.failed("ask the CRI for the image", err)
		}
		if resp.GetImage().GetId() == id.String() {
			return nil
		}
		now, err := n.client.ImageService().Get(ctx, name)
		switch {
		case err == nil && now.Target.Digest != target.Digest:
			return nil // replaced by someone else in the meantime, as a tag may be
		case errdefs.IsNotFound(err):
			return fmt.Errorf("image %s was removed while it was received: %w", name, errdefs.ErrAborted)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(criPoll):
		}
	}
}
