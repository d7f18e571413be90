// Package engine is BuildKit's solver, Dockerfile front end, session and progress
// assembled in this process over kiln's sandbox runtimes and build store.
//
// It is the only package that imports BuildKit's internals. It promises that
// every process of a build runs in a sandbox of the configured class, that no
// front end but the built-in one runs unless the configuration lists it by
// digest, and that no entitlement is ever granted. It speaks BuildKit's own API
// to its clients: Client returns one that is connected inside the process.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// Config says how to assemble an engine of a single user.
type Config struct {
	NodeConfig
	// Sandbox is the class of sandbox that every step runs in.
	Sandbox sandbox.Class
}

// Engine builds images. Its methods may be called concurrently.
type Engine struct {
	images     *imageStore
	controller *control.Controller
	keeper     *keeper
	// databases are those that deferred has synced.
	databases []snapshot.Database
	deferred  *snapshot.DeferredSync
	// opened is what the controller closes, if there is one.
	opened   []io.Closer
	server   *grpc.Server
	listener *bufconn.Listener
	served   chan error
	// conn is made at the first call that is forwarded.
	connOnce sync.Once
	conn     *grpc.ClientConn
	connErr  error
	// node is closed with the engine when it has no other.
	node *Node
	// settle ends the work of an engine that is closed right after its build; nil:
	// there is nothing to do.
	settle func() error
}

// maxMessageSize bounds a gRPC message in bytes; it is what BuildKit's clients
// are set to.
const maxMessageSize = 16 << 20

// pipeSize is the buffer of a connection inside the process, in bytes.
const pipeSize = 1 << 20

// New assembles the only engine over the state in cfg.Root, for a build or several one
// after another: sandboxes are prepared for the steps that a build has left, and none for
// later ones. What OpenNode does to this process, New does.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	node, err := OpenNode(ctx, cfg.NodeConfig)
	if err != nil {
		return nil, err
	}
	node.runtimes.expected = &expectedSteps{}
	e, err := node.newEngine(ctx, node.cfg.Root, Domain{Sandbox: cfg.Sandbox})
	if err != nil {
		return nil, errors.Join(err, node.Close())
	}
	e.node = node
	e.settle = func() error { return e.keeper.settle(ctx) }
	return e, nil
}

// newEngine assembles an engine whose own state is in dir.
func (n *Node) newEngine(ctx context.Context, dir string, d Domain) (_ *Engine, err error) {
	e := &Engine{images: newImageStore(n.store, d), deferred: n.deferred, served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if err := n.assemble(ctx, e, dir, d); err != nil {
		return nil, err
	}
	e.server = grpc.NewServer(
		grpc.ChainUnaryInterceptor(grpcerrors.UnaryServerInterceptor, e.keeper.intercept),
		grpc.ChainStreamInterceptor(grpcerrors.StreamServerInterceptor, e.keeper.interceptStream),
		grpc.MaxRecvMsgSize(maxMessageSize), grpc.MaxSendMsgSize(maxMessageSize),
	)
	e.controller.Register(e.server)
	e.listener = bufconn.Listen(pipeSize)
	go func() { e.served <- e.server.Serve(e.listener) }()
	return e, nil
}

// Client returns a client of the engine, connected inside the process. The caller
// closes it.
func (e *Engine) Client(ctx context.Context) (*client.Client, error) {
	c, err := client.New(ctx, "passthrough:engine", client.WithContextDialer(e.dial))
	if err != nil {
		return nil, fmt.Errorf("connect to the engine: %w", err)
	}
	return c, nil
}

func (e *Engine) dial(ctx context.Context, _ string) (net.Conn, error) {
	return e.listener.DialContext(ctx)
}

// Close ends what runs and releases everything that the engine holds.
func (e *Engine) Close() error {
	var errs []error
	if e.connOnce.Do(func() {}); e.conn != nil {
		errs = append(errs, e.conn.Close())
	}
	if e.server != nil {
		e.server.Stop()
		<-e.served
	}
	if e.settle != nil {
		errs = append(errs, e.settle())
	}
	if e.keeper != nil {
		e.keeper.close()
	}
	errs = append(errs, e.deferred.Remove(e.databases...))
	if e.controller != nil {
		e.opened = []io.Closer{e.controller}
	}
	for _, c := range e.opened {
		errs = append(errs, c.Close())
	}
	if e.node != nil {
		errs = append(errs, e.node.Close())
	}
	return errors.Join(errs...)
}
