package server

import (
	"context"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// solveMethod is the call that is a build of one of BuildKit's clients. sessionMethod
// is what comes before it.
const (
	solveMethod   = "/moby.buildkit.v1.Control/Solve"
	sessionMethod = "/moby.buildkit.v1.Control/Session"
)

// drain counts builds of BuildKit's clients, and lets no new one begin once it has
// been asked to.
type drain struct {
	// mu guards what follows.
	mu       sync.Mutex
	draining bool
	solves   int
	// idle is closed when draining and no build runs.
	idle chan struct{}
}

func newDrain() *drain { return &drain{idle: make(chan struct{})} }

func (d *drain) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	end, err := d.begin(info.FullMethod)
	if err != nil {
		return nil, err
	}
	defer end()
	return next(ctx, req)
}

func (d *drain) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	end, err := d.begin(info.FullMethod)
	if err != nil {
		return err
	}
	defer end()
	return next(srv, ss)
}

func (d *drain) begin(fullMethod string) (end func(), err error) {
	if fullMethod != solveMethod && fullMethod != sessionMethod {
		return func() {}, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.draining {
		return nil, status.Error(codes.Unavailable, "the agent is ending and starts no build; use another node, or try again soon")
	}
	if fullMethod == sessionMethod {
		return func() {}, nil
	}
	d.solves++
	return d.end, nil
}

func (d *drain) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.solves--
	d.settle()
}

// settle closes idle when there is nothing left to wait for. Callers hold mu.
func (d *drain) settle() {
	if !d.draining || d.solves > 0 {
		return
	}
	select {
	case <-d.idle:
	default:
		close(d.idle)
	}
}

func (d *drain) wait(ctx context.Context) error {
	d.mu.Lock()
	d.draining = true
	d.settle()
	d.mu.Unlock()
	select {
	case <-d.idle:
		return nil
	case <-ctx.Done():
		d.mu.Lock()
		defer d.mu.Unlock()
		return fmt.Errorf("wait for %d builds of BuildKit's clients: %w", d.solves, context.Cause(ctx))
	}
}
