// Package nodestore is the container runtime of the node that kiln runs on, seen
// as a lender of what it has pulled and as a receiver of what kiln has built.
//
// It promises that nothing of the runtime changes but by Receive, that what kiln
// creates there is named as kiln's, and that everything which a failed or killed
// operation made is removed: at once when the operation fails, by the next start
// of the same owner when it was killed, by the runtime itself within a day when
// there is none. It never runs a container, and never removes an image, a layer
// or a snapshot that it did not create.
//
// The runtime belongs to the whole node, its tenants do not. Two rules keep them
// apart, and the callers apply them:
//
//   - A tenant is lent what it could have pulled itself. Before Lend, the registry
//     has answered a request for the image with the tenant's own credentials.
//     Lending does that for every blob.
//   - A tenant has that received which it could have pushed. Before Receive, the
//     tenant's right to the name has been checked: whoever may name an image on a
//     node decides what Pods of that name run there.
//
// Errors wrap the classes of github.com/containerd/errdefs: InvalidArgument and
// FailedPrecondition are about the caller's image or name, NotFound about what
// the node does not have, and Unavailable means that the runtime did not answer.
package nodestore

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Node is a node's container runtime. All methods may be called concurrently.
// Whoever makes a Node closes it, after releasing its holds.
type Node interface {
	// Info describes the runtime. It asks the runtime each time, so that it also
	// tells whether the runtime answers.
	Info(ctx context.Context) (Info, error)

	// Probe returns the size in bytes of each of the blobs that the node has. It
	// is cheap: it neither reads nor holds them, and they may be gone when it
	// returns. The answer tells what other tenants use: it is for placing builds
	// and not for showing.
	Probe(ctx context.Context, blobs ...digest.Digest) (map[digest.Digest]int64, error)

	// Bytes returns how much the node has of an image for its own platform: the bytes
	// of the configuration and the layers that Lend would give. It is 0 when the node
	// has no image of exactly this registry, repository and tag or digest; a name with
	// neither means latest. What the registry calls so may be another image by now: it
	// is not asked. As with Probe the answer is for placing builds and not for showing.
	Bytes(ctx context.Context, image reference.Named) (int64, error)

	// Lend holds what the node has of an image, or of every image of a repository
	// when the name has no digest. The digest is that of the index or manifest
	// which the registry resolved the name to; a name with a tag is refused,
	// because a tag means something else on every node. Only images that the node
	// knows by this registry and repository are lent, whatever their digest: a
	// registry of the tenant's own can name any digest.
	//
	// It fails with NotFound when the node has no such image. The caller releases
	// the hold.
	Lend(ctx context.Context, image reference.Named) (Hold, error)

	// Receive makes image runnable on the node: when it returns, the kubelet finds
	// the image by its name and by its digest, unpacked. It returns the image ID,
	// which is the digest of the image's configuration. A name that another image
	// has moves to the new one, as `docker tag` does; the other image stays until
	// the kubelet collects it. An image that the runtime pins, such as that of Pod
	// sandboxes, is never replaced. On an error no name has changed, and what was
	// copied is collected.
	Receive(ctx context.Context, image Image) (digest.Digest, error)

	// Close ends the connection to the runtime.
	Close() error
}

// Hold keeps blobs and layers of a node from being collected, whatever the
// kubelet deletes meanwhile.
//
//	held → released
//
// Its provider serves the blobs of the held images alone, and fails with NotFound
// for any other. A read may be a call to the runtime's process, so reads of a
// megabyte are much faster than small ones. A runtime may have discarded the blobs of layers that it
// unpacked; then Layers still has them, as directories. All methods may be called
// concurrently.
type Hold interface {
	content.InfoReaderProvider

	// Layers returns the directories of the unpacked layers that chainID stands
	// for, topmost first, as an overlay mount takes them. They are the runtime's
	// own, shared with what runs on the node: they are mounted read-only and never
	// written to. They stay until Release. It fails with NotFound when the chain is
	// no part of the held images or is not unpacked, and with NotImplemented when
	// the runtime keeps layers as something else than directories.
	Layers(ctx context.Context, chainID digest.Digest) ([]string, error)

	// Release gives everything back. Readers that are open and directories that
	// are mounted must not be used after it. A second call does nothing.
	Release(ctx context.Context) error
}

// Image is a built image that a node is to receive.
type Image struct {
	// Name is what Pods call the image; see ParseName. The caller has checked that
	// whom it works for may push this name. A digest in it must be that of Target.
	Name reference.Named
	// Target describes the image's index or manifest. Of an index the node receives
	// the image for its own platform.
	Target ocispecs.Descriptor
	// Content has Target and everything that it refers to. It is asked with the
	// context of Receive, so a namespace in that is the content's. The sizes and
	// digests of what it gives are verified.
	Content content.Provider
}

// Info describes a node's runtime.
type Info struct {
	// Runtime is the name of the runtime: "containerd".
	Runtime string
	// Version is the runtime's own version.
	Version string
	// Socket is the path of the runtime's socket.
	Socket string
	// Snapshotter is what the runtime keeps unpacked layers with.
	Snapshotter string
	// DiscardsBlobs is set when the runtime is configured to discard the blobs of
	// layers that it has unpacked. Such a node lends no layer to a pull.
	DiscardsBlobs bool
}
