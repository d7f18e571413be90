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
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// Config says how to assemble an engine.
type Config struct {
	// Root is the state directory. The caller holds its lock (snapshot.Lock).
	Root string
	// Sandbox is the class of sandbox that every step runs in.
	Sandbox sandbox.Class
	// RuncPath and RunscPath are the OCI runtimes of the two classes. Only that of
	// Sandbox is used.
	RuncPath, RunscPath string
	// Frontends lists the external front ends that a Dockerfile's syntax line or a
	// client may name, each as an image reference with a digest. They run in a
	// sandbox as every step does. The Dockerfile front end is built in.
	Frontends []string
}

// Engine builds images. Its methods may be called concurrently.
type Engine struct {
	store      *snapshot.Store
	executor   *stepExecutor
	controller *control.Controller
	server     *grpc.Server
	listener   *bufconn.Listener
	served     chan error
}

// maxMessageSize bounds a gRPC message in bytes; it is what BuildKit's clients
// are set to.
const maxMessageSize = 16 << 20

// pipeSize is the buffer of a connection inside the process, in bytes.
const pipeSize = 1 << 20

// New assembles an engine over the state in cfg.Root. It sets TMPDIR of this
// process to a directory below Root, so that nothing that a killed process had
// there outlives the next New.
func New(ctx context.Context, cfg Config) (_ *Engine, err error) {
	if cfg.Root, err = checkedRoot(cfg.Root); err != nil {
		return nil, err
	}
	frontends, err := newFrontendPolicy(cfg.Frontends)
	if err != nil {
		return nil, err
	}
	if err := freshTempDir(filepath.Join(cfg.Root, "tmp")); err != nil {
		return nil, err
	}
	e := &Engine{served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if e.store, err = snapshot.Open(ctx, filepath.Join(cfg.Root, "store")); err != nil {
		return nil, err
	}
	e.executor = newStepExecutor(cfg)
	if e.controller, err = newController(ctx, cfg, e.store, e.executor, frontends); err != nil {
		return nil, err
	}
	e.server = grpc.NewServer(
		grpc.UnaryInterceptor(grpcerrors.UnaryServerInterceptor),
		grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor),
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
	c, err := client.New(ctx, "passthrough:engine", client.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return e.listener.DialContext(ctx)
	}))
	if err != nil {
		return nil, fmt.Errorf("connect to the engine: %w", err)
	}
	return c, nil
}

// Close ends what runs and releases everything that the engine holds.
func (e *Engine) Close() error {
	var errs []error
	if e.server != nil {
		e.server.Stop()
		<-e.served
	}
	if e.controller != nil {
		errs = append(errs, e.controller.Close())
	}
	if e.executor != nil {
		errs = append(errs, e.executor.Close())
	}
	if e.store != nil {
		errs = append(errs, e.store.Close())
	}
	return errors.Join(errs...)
}

// checkedRoot returns root as an absolute path, and refuses one that cannot be
// written in the kernel's overlay options.
func checkedRoot(root string) (string, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return "", fmt.Errorf("state directory %q: %w", root, err)
	}
	if strings.ContainsAny(abs, ":,\\\n") {
		return "", fmt.Errorf("state directory %q: a colon, comma, backslash or line break cannot be used in overlay mounts; choose another --root", abs)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return "", fmt.Errorf("make state directory: %w", err)
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return "", fmt.Errorf("state directory: %w", err)
	}
	return abs, nil
}

func freshTempDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clear temporary directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make temporary directory: %w", err)
	}
	return os.Setenv("TMPDIR", dir)
}
