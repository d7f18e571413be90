package engine

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/snapshot"
)

// imageStore keeps the images that builds of one domain store by name, so that
// their blobs stay until they were handed on, and at most for an hour. Names of two domains never meet.
type imageStore struct {
	images  images.Store
	content *containerdsnapshot.Store
	prefix  string
}

func newImageStore(store *snapshot.Store, d Domain) *imageStore {
	var blobs content.Store = store.DB.ContentStore()
	if d.Tenant != "" { // the only user of a store has it for itself
		blobs = newDomainContent(blobs, d)
	}
	return &imageStore{
		images:  ctdmetadata.NewImageStore(store.DB),
		content: containerdsnapshot.NewContentStore(blobs, snapshot.Namespace),
		prefix:  d.key() + "|",
	}
}

func (s *imageStore) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, snapshot.Namespace)
}

// Get implements images.Store.
func (s *imageStore) Get(ctx context.Context, name string) (images.Image, error) {
	img, err := s.images.Get(s.in(ctx), s.prefix+name)
	img.Name = name
	return img, err
}

// List implements images.Store. Nobody may list images by name.
func (s *imageStore) List(context.Context, ...string) ([]images.Image, error) { return nil, nil }

// holdTime is how long a stored image is kept for whoever wants it. Images are not
// the cache: one that is forgotten must not keep its layers for ever.
const holdTime = time.Hour

// expireLabel is the time at which containerd's collector drops an object.
const expireLabel = "containerd.io/gc.expire"

func (s *imageStore) held(img images.Image) images.Image {
	img.Name = s.prefix + img.Name
	labels := map[string]string{expireLabel: time.Now().Add(holdTime).UTC().Format(time.RFC3339)}
	maps.Copy(labels, img.Labels)
	img.Labels = labels
	return img
}

// Create implements images.Store.
func (s *imageStore) Create(ctx context.Context, img images.Image) (images.Image, error) {
	return s.images.Create(s.in(ctx), s.held(img))
}

// Update implements images.Store.
func (s *imageStore) Update(ctx context.Context, img images.Image, fields ...string) (images.Image, error) {
	return s.images.Update(s.in(ctx), s.held(img), fields...)
}

// Delete implements images.Store.
func (s *imageStore) Delete(ctx context.Context, name string, opts ...images.DeleteOpt) error {
	return s.images.Delete(s.in(ctx), s.prefix+name, opts...)
}

// Image returns the image that a build of this engine stored under name, and what
// its blobs are read from. They stay until DeleteImage, or for an hour.
func (e *Engine) Image(ctx context.Context, name string) (ocispecs.Descriptor, content.Provider, error) {
	img, err := e.images.Get(ctx, name)
	if err != nil {
		return ocispecs.Descriptor{}, nil, fmt.Errorf("find image %s in the build store: %w", name, err)
	}
	return img.Target, e.images.content, nil
}

// DeleteImage forgets an image that a build of this engine stored. Its blobs stay
// as long as the cache needs them.
func (e *Engine) DeleteImage(ctx context.Context, name string) error {
	if err := e.images.Delete(ctx, name); err != nil {
		return fmt.Errorf("remove image %s from the build store: %w", name, err)
	}
	return nil
}
