package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxDocument bounds an index, a manifest or a configuration that is read, in
// bytes. Registries allow manifests of 4 MiB.
const maxDocument = 8 << 20

// maxDescriptors bounds how many blobs the images of one operation may have.
const maxDescriptors = 10_000

// documents reads indexes, manifests and configurations of a bounded size.
type documents struct{ content.Provider }

// ReaderAt implements content.Provider. The error names the blob.
func (d documents) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	ra, err := d.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("read blob %s: %w", desc.Digest, err)
	}
	if ra.Size() > maxDocument {
		size := ra.Size()
		ra.Close()
		return nil, fmt.Errorf("read blob %s: %d bytes are too many for an index, a manifest or a configuration: %w", desc.Digest, size, errdefs.ErrInvalidArgument)
	}
	return ra, nil
}

// tree is what hangs below the indexes and manifests of images.
type tree struct {
	// blobs has every blob, the indexes and manifests too.
	blobs map[digest.Digest]ocispecs.Descriptor
	// configs has the configurations of the images.
	configs map[digest.Digest]ocispecs.Descriptor
}

func newTree() *tree {
	return &tree{blobs: map[digest.Digest]ocispecs.Descriptor{}, configs: map[digest.Digest]ocispecs.Descriptor{}}
}

// add adds what hangs below desc, as far as the provider has it: of an index of
// many platforms a node has one.
func (t *tree) add(ctx context.Context, from content.Provider, desc ocispecs.Descriptor) error {
	next := []ocispecs.Descriptor{desc}
	for len(next) > 0 {
		desc, next = next[0], next[1:]
		if _, seen := t.blobs[desc.Digest]; seen {
			continue
		}
		if err := checkDescriptor(desc); err != nil {
			return err
		}
		if len(t.blobs) >= maxDescriptors {
			return fmt.Errorf("image has more than %d blobs: %w", maxDescriptors, errdefs.ErrInvalidArgument)
		}
		t.blobs[desc.Digest] = desc
		if images.IsKnownConfig(desc.MediaType) {
			t.configs[desc.Digest] = desc
		}
		if !images.IsManifestType(desc.MediaType) && !images.IsIndexType(desc.MediaType) {
			continue
		}
		children, err := images.Children(ctx, documents{from}, plain(desc))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read manifest %s: %w", desc.Digest, err)
		}
		next = append(next, children...)
	}
	return nil
}

// chains returns every chain of layers that the tree's images are made of.
func (t *tree) chains(ctx context.Context, from content.Provider) (map[digest.Digest]struct{}, error) {
	all := map[digest.Digest]struct{}{}
	for desc := range maps.Values(t.configs) {
		raw, err := content.ReadBlob(ctx, documents{from}, plain(desc))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var config ocispecs.Image
		if err := json.Unmarshal(raw, &config); err != nil {
			return nil, fmt.Errorf("read configuration %s: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
		}
		for _, id := range config.RootFS.DiffIDs {
			if err := id.Validate(); err != nil {
				return nil, fmt.Errorf("read configuration %s: layer %q: %w: %w", desc.Digest, id, err, errdefs.ErrInvalidArgument)
			}
		}
		for _, id := range identity.ChainIDs(config.RootFS.DiffIDs) {
			all[id] = struct{}{}
		}
	}
	return all, nil
}

// checkDescriptor refuses what no registry would take.
func checkDescriptor(desc ocispecs.Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("blob %q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if desc.Size < 0 {
		return fmt.Errorf("blob %s: size %d: %w", desc.Digest, desc.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

// plain returns desc without what says nothing of the blob itself: neither its
// embedded data nor its annotations and addresses are believed.
func plain(desc ocispecs.Descriptor) ocispecs.Descriptor {
	return ocispecs.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
}
