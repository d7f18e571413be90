package hostile

import (
	"encoding/json"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an image in the making: blobs by digest.
type Image struct {
	Blobs    map[digest.Digest][]byte
	Manifest ocispecs.Descriptor
}

// NewImage returns an image of uncompressed layers, lowest first. change may make its
// configuration and manifest say what it likes; it may be nil.
func NewImage(layers [][]byte, change func(*ocispecs.Image, *ocispecs.Manifest)) Image {
	im := Image{Blobs: map[digest.Digest][]byte{}}
	config := ocispecs.Image{Platform: ocispecs.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispecs.RootFS{Type: "layers"}}
	manifest := ocispecs.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest}
	for _, l := range layers {
		d := im.Add(ocispecs.MediaTypeImageLayer, l)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, d.Digest)
		manifest.Layers = append(manifest.Layers, d)
	}
	if change != nil {
		change(&config, &manifest)
	}
	im.Finish(config, &manifest)
	return im
}

// Finish adds a configuration and the manifest, which gets it unless it names one.
// Values may be of any type that has a form in JSON.
func (im *Image) Finish(config any, manifest *ocispecs.Manifest) {
	if manifest.Config.Digest == "" {
		manifest.Config = im.Add(ocispecs.MediaTypeImageConfig, encode(config))
	}
	im.Manifest = im.Add(ocispecs.MediaTypeImageManifest, encode(manifest))
}

// Add adds a blob.
func (im *Image) Add(mediaType string, data []byte) ocispecs.Descriptor {
	d := digest.FromBytes(data)
	im.Blobs[d] = data
	return ocispecs.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // the types that are given can be encoded
	}
	return data
}
