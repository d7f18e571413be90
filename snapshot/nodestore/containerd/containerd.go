// Package containerd is a node whose runtime is containerd.
//
// It talks to containerd's own API and to the CRI on the same socket, which only
// root may open, and works in the namespace of the kubelet's images alone. What it
// makes there are leases, which are labelled with the owner and expire; views of
// snapshots under such a lease; and the images that were received. The directories
// that a hold gives are containerd's, so its root directory has to be visible to
// this process at the same path.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"regexp"
	"strings"
	"sync"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	digest "github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kiln-build/kiln/snapshot/nodestore"
)

// namespace is where the kubelet's images are.
const namespace = "k8s.io"

// DefaultSocket is where containerd listens unless it is configured otherwise.
const DefaultSocket = "/run/containerd/containerd.sock"

// snapshotterPrefix starts the name of a snapshotter's directory.
const snapshotterPrefix = "io.containerd.snapshotter.v1."

// ownerPattern is what an owner may be called, so that it can stand in a label and
// in a filter.
var ownerPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// Config says which containerd to use, and as whom.
type Config struct {
	// Socket is the path of containerd's socket; DefaultSocket when it is empty.
	Socket string
	// Owner names this agent among the users of the runtime: letters, digits, dots,
	// dashes and underscores. New removes what an earlier process of the same owner
	// left, so no two processes may have the same owner at once. "kiln" when it is
	// empty.
	Owner string
	// Snapshotter is the snapshotter that the kubelet's containers run on; when it is
	// empty, containerd's CRI is asked for its default.
	Snapshotter string
}

// Node is a node's containerd. It implements nodestore.Node.
type Node struct {
	client      *ctd.Client
	images      runtimev1.ImageServiceClient
	socket      string
	owner       string
	snapshotter string

	// naming makes received images get their names one after the other.
	naming sync.Mutex

	mu sync.Mutex
	// debts are leases that could not be deleted yet; mu guards it.
	debts []leases.Lease
}

var _ nodestore.Node = (*Node)(nil)

// New connects to containerd, and removes the holds of an earlier process of the
// same owner. The caller closes the node.
func New(ctx context.Context, cfg Config) (_ *Node, err error) {
	if cfg.Socket == "" {
		cfg.Socket = DefaultSocket
	}
	if cfg.Owner == "" {
		cfg.Owner = "kiln"
	}
	if !ownerPattern.MatchString(cfg.Owner) {
		return nil, fmt.Errorf("owner %q: want at most 63 letters, digits, dots, dashes and underscores: %w", cfg.Owner, errdefs.ErrInvalidArgument)
	}
	// A socket that is missing is an error at once, and not after a wait.
	dial := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", cfg.Socket)
	})
	client, err := ctd.New(cfg.Socket, ctd.WithDefaultNamespace(namespace), ctd.WithExtraDialOpts([]grpc.DialOption{dial}))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", cfg.Socket, err)
	}
	n := &Node{client: client, socket: cfg.Socket, owner: cfg.Owner, snapshotter: cfg.Snapshotter}
	defer func() {
		if err != nil {
			err = errors.Join(err, client.Close())
		}
	}()
	conn, ok := client.Conn().(*grpc.ClientConn)
	if !ok {
		return nil, fmt.Errorf("connect to containerd at %s: no connection", cfg.Socket)
	}
	n.images = runtimev1.NewImageServiceClient(conn)
	if n.snapshotter == "" {
		if n.snapshotter, err = n.defaultSnapshotter(ctx); err != nil {
			return nil, err
		}
	}
	if err := n.removeLeftHolds(ctx); err != nil {
		return nil, err
	}
	return n, nil
}

// Close implements nodestore.Node.
func (n *Node) Close() error { return n.client.Close() }

// reconnectTime is how long a call waits for a containerd that did not answer before.
const reconnectTime = 2 * time.Second

// reconnect tries to connect again at once when the last attempt failed. Otherwise calls
// would fail for seconds after containerd has come back, as after an upgrade.
func (n *Node) reconnect(ctx context.Context) {
	conn, ok := n.client.Conn().(*grpc.ClientConn)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, reconnectTime)
	defer cancel()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		conn.ResetConnectBackoff()
		conn.Connect()
		poll, stop := context.WithTimeout(ctx, reconnectTime/10)
		conn.WaitForStateChange(poll, state)
		stop()
		if ctx.Err() != nil {
			return // the call itself says what is wrong
		}
	}
}

// Info implements nodestore.Node.
func (n *Node) Info(ctx context.Context) (nodestore.Info, error) {
	version, err := n.client.Version(ctx)
	if err != nil {
		return nodestore.Info{}, n.failed("ask for the version", err)
	}
	info := nodestore.Info{Runtime: "containerd", Version: version.Version, Socket: n.socket, Snapshotter: n.snapshotter}
	plugins, err := n.client.IntrospectionService().Plugins(ctx, "type==io.containerd.cri.v1,id==images")
	if err != nil {
		return nodestore.Info{}, n.failed("ask for the image plugin", err)
	}
	info.DiscardsBlobs = discardsBlobs(plugins)
	return info, nil
}

func discardsBlobs(plugins *introspectionapi.PluginsResponse) bool {
	for _, p := range plugins.GetPlugins() {
		if p.GetExports()["DiscardUnpackedLayers"] == "true" {
			return true
		}
	}
	return false
}

// Probe implements nodestore.Node.
func (n *Node) Probe(ctx context.Context, blobs ...digest.Digest) (map[digest.Digest]int64, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	store := n.client.ContentStore()
	has := map[digest.Digest]int64{}
	for _, blob := range blobs {
		if err := blob.Validate(); err != nil {
			return nil, fmt.Errorf("blob %q: %w: %w", blob, err, errdefs.ErrInvalidArgument)
		}
		info, err := store.Info(ctx, blob)
		switch {
		case err == nil:
			has[blob] = info.Size
		case !errdefs.IsNotFound(err):
			return nil, n.failed("look for blob "+blob.String(), err)
		}
	}
	return has, nil
}

// defaultSnapshotter returns the snapshotter of the CRI. The file system that the
// CRI names first is that of its snapshotter.
func (n *Node) defaultSnapshotter(ctx context.Context) (string, error) {
	resp, err := n.images.ImageFsInfo(ctx, &runtimev1.ImageFsInfoRequest{})
	if err != nil {
		return "", n.failed("ask for the snapshotter", err)
	}
	if all := resp.GetImageFilesystems(); len(all) > 0 {
		if name, ok := strings.CutPrefix(path.Base(all[0].GetFsId().GetMountpoint()), snapshotterPrefix); ok {
			return name, nil
		}
	}
	return "", fmt.Errorf("containerd at %s does not tell its snapshotter; set it in the configuration: %w", n.socket, errdefs.ErrFailedPrecondition)
}

// failed says what could not be done with which daemon, and what to look at.
func (n *Node) failed(what string, err error) error {
	if s, ok := status.FromError(err); ok && s.Code() != codes.Unknown {
		err = errgrpc.ToNative(err) // some of containerd's clients do not
	}
	switch {
	case errdefs.IsUnavailable(err):
		return fmt.Errorf("%s: containerd at %s does not answer; is it running?: %w", what, n.socket, err)
	case errdefs.IsNotImplemented(err):
		return fmt.Errorf("%s: containerd at %s does not serve the kubelet; enable its CRI plugin: %w", what, n.socket, err)
	}
	return fmt.Errorf("%s: containerd at %s: %w", what, n.socket, err)
}
