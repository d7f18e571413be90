package nodestore

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// ParseName returns the full name that the kubelet and its runtime know an image
// by: "busybox" is docker.io/library/busybox:latest. A tag beside a digest is
// dropped. The error is InvalidArgument.
func ParseName(name string) (reference.Named, error) {
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return nil, fmt.Errorf("image name %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return named, nil
}

// repository returns the repository of a registry host, or false when the two
// together are no name of one.
func repository(host, path string) (reference.Named, bool) {
	named, err := reference.ParseNormalizedNamed(host + "/" + path)
	if err != nil || !reference.IsNameOnly(named) {
		return nil, false
	}
	if reference.Domain(named) != host || reference.Path(named) != path {
		return nil, false
	}
	return named, true
}
