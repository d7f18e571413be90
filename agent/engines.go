package agent

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot/nodestore"
)

// Domain is what shares no step cache with anything else: one class of sandbox of
// one tenant.
type Domain struct {
	// Tenant is whose builds run there.
	Tenant string
	// Sandbox is the class of sandbox of their steps.
	Sandbox sandbox.Class
}

// Engines gives access to the engines of a node. Its methods may be called
// concurrently.
type Engines interface {
	// Open returns a session with a domain's engine, which is made when it is not
	// there. The caller closes the session.
	Open(ctx context.Context, d Domain) (Session, error)
	// Domains returns the domains that have state on the node.
	Domains(ctx context.Context) ([]Domain, error)
}

// Session is the use of one engine. Its methods may be called concurrently, and not
// after Close.
type Session interface {
	// Build runs a solve, and closes status before it returns.
	Build(ctx context.Context, opt client.SolveOpt, product string, build gateway.BuildFunc, status chan *client.SolveStatus) (*client.SolveResponse, error)
	// DiskUsage returns the records of the cache.
	DiskUsage(ctx context.Context, opts ...client.DiskUsageOption) ([]*client.UsageInfo, error)
	// Prune removes records of the cache and sends each to removed, if it is not
	// nil. It does not close it.
	Prune(ctx context.Context, removed chan client.UsageInfo, opts ...client.PruneOption) error
	Results
	// Close ends the session.
	Close() error
}

// Results is what builds of one engine made. Its methods may be called concurrently.
type Results interface {
	// Content returns the blobs that the domain has had. Manifests and indexes of the
	// youngest builds are among them; layers may be gone.
	Content() content.Provider
	// Image returns an image that a build has stored by name. It stays until
	// DeleteImage.
	Image(ctx context.Context, name string) (ocispecs.Descriptor, content.Provider, error)
	// DeleteImage forgets an image that a build has stored.
	DeleteImage(ctx context.Context, name string) error
}

// ImageReceiver puts built images where the node's kubelet finds them. A
// nodestore.Node is one.
type ImageReceiver interface {
	// Receive makes an image runnable on the node and returns its ID. The agent has
	// checked by policy that the tenant may give an image that name.
	Receive(ctx context.Context, image nodestore.Image) (digest.Digest, error)
}
