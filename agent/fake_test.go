package agent_test

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/agent"
)

// faultyEngines are engines that end builds in ways that real ones do rarely. What
// a build does is decided by do.
type faultyEngines struct {
	// do is a build; it must return when ctx ends. nil: it ends well at once.
	do func(ctx context.Context, tell func(*client.SolveStatus)) error
	// open fails Open when it is not nil.
	open error
	// facts is what the exporters tell besides the image's digest.
	facts map[string]string
	// content has what was built.
	content content.Provider

	mu       sync.Mutex
	sessions int // guarded by mu; open now
	opened   []agent.Domain
}

func (e *faultyEngines) Open(_ context.Context, d agent.Domain) (agent.Session, error) {
	if e.open != nil {
		return nil, e.open
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sessions++
	e.opened = append(e.opened, d)
	return &faultySession{engines: e}, nil
}

func (e *faultyEngines) Domains(context.Context) ([]agent.Domain, error) {
	return []agent.Domain{{"b", "gvisor"}, {"a", "userns"}, {"a", "gvisor"}}, nil
}

// left is the number of sessions that were not closed.
func (e *faultyEngines) left() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sessions
}

type faultySession struct{ engines *faultyEngines }

func (s *faultySession) Build(ctx context.Context, _ client.SolveOpt, _ string, _ gateway.BuildFunc, status chan *client.SolveStatus) (*client.SolveResponse, error) {
	defer close(status)
	if s.engines.do != nil {
		if err := s.engines.do(ctx, func(news *client.SolveStatus) { status <- news }); err != nil {
			return nil, err
		}
	}
	facts := map[string]string{"containerimage.digest": digest.FromString("image").String()}
	maps.Copy(facts, s.engines.facts)
	return &client.SolveResponse{ExporterResponse: facts}, nil
}

func (s *faultySession) DiskUsage(context.Context, ...client.DiskUsageOption) ([]*client.UsageInfo, error) {
	return []*client.UsageInfo{
		{Size: 10, CreatedAt: time.Now().Add(time.Hour)}, {Size: 5, InUse: true, CreatedAt: time.Now().Add(time.Hour)}, {Size: 3},
	}, nil
}

func (s *faultySession) Prune(_ context.Context, removed chan client.UsageInfo, _ ...client.PruneOption) error {
	removed <- client.UsageInfo{Size: 7}
	removed <- client.UsageInfo{Size: 8}
	return nil
}

func (s *faultySession) Content() content.Provider { return s.engines.content }

func (s *faultySession) Image(context.Context, string) (ocispecs.Descriptor, content.Provider, error) {
	return ocispecs.Descriptor{}, nil, errors.New("no such image")
}

func (s *faultySession) DeleteImage(context.Context, string) error { return nil }

func (s *faultySession) Close() error {
	s.engines.mu.Lock()
	defer s.engines.mu.Unlock()
	s.engines.sessions--
	return nil
}
