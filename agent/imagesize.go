package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	ctdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/util/attestation"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds on what is read to learn the size of an image.
const (
	// maxManifest bounds an index or a manifest, in bytes. Registries take no larger one.
	maxManifest = 4 << 20
	// maxManifests bounds how many of them are read for one image.
	maxManifests = 64
	// sizeTime bounds how long that takes.
	sizeTime = 5 * time.Second
)

// imageSize returns what BuildResult.image_size is of the image that the exporters tell
// of. It is 0 when that is not known, which no build fails for.
func (s *solver) imageSize(ctx context.Context, j *job, facts map[string]string) int64 {
	encoded := facts[exptypes.ExporterImageDescriptorKey]
	if encoded == "" {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, sizeTime)
	defer cancel()
	size, err := sizeOf(ctx, j.session.Content(), encoded)
	if err != nil {
		s.cfg.Logger.Warn("the size of an image is not known", "tenant", j.key.Tenant, "build", j.key.ID, "error", err)
		return 0
	}
	return size
}

// sizeOf returns the size of the image with a descriptor in the exporters' form.
func sizeOf(ctx context.Context, from content.Provider, encoded string) (int64, error) {
	raw, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return 0, fmt.Errorf("decode descriptor of the image: %w", err)
	}
	var desc ocispecs.Descriptor
	if err := json.Unmarshal(raw, &desc); err != nil {
		return 0, fmt.Errorf("decode descriptor of the image: %w", err)
	}
	m := measure{from: documents{from}}
	if err := m.add(ctx, desc); err != nil {
		return 0, err
	}
	return m.size, nil
}

// documents reads blobs of the size that indexes and manifests have.
type documents struct{ content.Provider }

// ReaderAt implements content.Provider.
func (d documents) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	ra, err := d.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	if size := ra.Size(); size > maxManifest {
		return nil, errors.Join(fmt.Errorf("it has %d bytes, %d is the most", size, maxManifest), ra.Close())
	}
	return ra, nil
}

// measure sums up what manifests refer to.
type measure struct {
	from content.Provider
	// size has what was summed up, and read how many manifests that was.
	size int64
	read int
}

// add adds the image that desc describes: all of them when it is an index.
func (m *measure) add(ctx context.Context, desc ocispecs.Descriptor) error {
	switch {
	case ctdimages.IsManifestType(desc.MediaType):
		var manifest ocispecs.Manifest
		if err := m.decode(ctx, desc, &manifest); err != nil {
			return err
		}
		for _, blob := range append(manifest.Layers, manifest.Config) {
			// The layers of a base image may be known by what its registry says alone.
			if blob.Size < 0 || blob.Size > math.MaxInt64-m.size {
				return fmt.Errorf("manifest %s: size %d of %s cannot be", desc.Digest, blob.Size, blob.Digest)
			}
			m.size += blob.Size
		}
		return nil
	case ctdimages.IsIndexType(desc.MediaType):
		var index ocispecs.Index
		if err := m.decode(ctx, desc, &index); err != nil {
			return err
		}
		for _, child := range index.Manifests {
			if child.Annotations[attestation.DockerAnnotationReferenceType] == attestation.DockerAnnotationReferenceTypeDefault {
				continue
			}
			if err := m.add(ctx, child); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("%s is neither a manifest nor an index but %q", desc.Digest, desc.MediaType)
}

// decode reads an index or a manifest.
func (m *measure) decode(ctx context.Context, desc ocispecs.Descriptor, into any) error {
	if m.read++; m.read > maxManifests {
		return fmt.Errorf("image has more than %d manifests", maxManifests)
	}
	raw, err := content.ReadBlob(ctx, m.from, ocispecs.Descriptor{Digest: desc.Digest})
	if err != nil {
		return fmt.Errorf("read manifest %s: %w", desc.Digest, err)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("decode manifest %s: %w", desc.Digest, err)
	}
	return nil
}
