package agent

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/agent/engine"
)

// NodeEngines returns the engines of a node that is open in this process. The
// caller closes the node, after the agent.
func NodeEngines(n *engine.Node) Engines { return nodeEngines{n} }

type nodeEngines struct{ node *engine.Node }

// Open implements Engines.
func (e nodeEngines) Open(ctx context.Context, d Domain) (Session, error) {
	eng, release, err := e.node.Engine(ctx, engine.Domain{Tenant: d.Tenant, Sandbox: d.Sandbox})
	if err != nil {
		return nil, err
	}
	// The connection outlives the context of the call that opened it.
	c, err := eng.Client(context.WithoutCancel(ctx))
	if err != nil {
		release()
		return nil, err
	}
	return &nodeSession{Client: c, engine: eng, release: release}, nil
}

// Domains implements Engines.
func (e nodeEngines) Domains(context.Context) ([]Domain, error) {
	all, err := e.node.Domains()
	if err != nil {
		return nil, err
	}
	out := make([]Domain, len(all))
	for i, d := range all {
		out[i] = Domain{Tenant: d.Tenant, Sandbox: d.Sandbox}
	}
	return out, nil
}

// nodeSession is a connection to an engine of this process.
type nodeSession struct {
	*client.Client
	engine  *engine.Engine
	release func()
}

// Image implements Session.
func (s *nodeSession) Image(ctx context.Context, name string) (ocispecs.Descriptor, content.Provider, error) {
	return s.engine.Image(ctx, name)
}

// DeleteImage implements Session.
func (s *nodeSession) DeleteImage(ctx context.Context, name string) error {
	return s.engine.DeleteImage(ctx, name)
}

// Close implements Session. An engine that nobody uses is closed by the node.
func (s *nodeSession) Close() error {
	err := s.Client.Close()
	s.release()
	return err
}
