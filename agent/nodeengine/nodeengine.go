// Package nodeengine gives package agent the engines of a node that is open in the
// same process.
package nodeengine

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/moby/buildkit/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/engine"
)

// New returns the engines of a node that is open in this process. The
// caller closes the node, after the agent.
func New(n *engine.Node) agent.Engines { return engines{n} }

type engines struct{ node *engine.Node }

// Open implements agent.Engines.
func (e engines) Open(ctx context.Context, d agent.Domain) (agent.Session, error) {
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
	return &session{Client: c, engine: eng, release: release}, nil
}

// Domains implements agent.Engines.
func (e engines) Domains(context.Context) ([]agent.Domain, error) {
	all, err := e.node.Domains()
	if err != nil {
		return nil, err
	}
	out := make([]agent.Domain, len(all))
	for i, d := range all {
		out[i] = agent.Domain{Tenant: d.Tenant, Sandbox: d.Sandbox}
	}
	return out, nil
}

// session is a connection to an engine of this process.
type session struct {
	*client.Client
	engine  *engine.Engine
	release func()
}

// Content implements agent.Results.
func (s *session) Content() content.Provider { return proxy.NewContentStore(s.ContentClient()) }

// Image implements agent.Results.
func (s *session) Image(ctx context.Context, name string) (ocispecs.Descriptor, content.Provider, error) {
	return s.engine.Image(ctx, name)
}

// DeleteImage implements agent.Results.
func (s *session) DeleteImage(ctx context.Context, name string) error {
	return s.engine.DeleteImage(ctx, name)
}

// Close implements agent.Session. An engine that nobody uses is closed by the node.
func (s *session) Close() error {
	err := s.Client.Close()
	s.release()
	return err
}
