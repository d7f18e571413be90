package agent

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kiln-build/kiln/agent/failure"
	"github.com/kiln-build/kiln/agent/record"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// stuckSession is an engine that does not end a solve until it is closed.
type stuckSession struct {
	Session
	closed chan struct{}
	ended  chan struct{}
}

func (s *stuckSession) Build(_ context.Context, _ client.SolveOpt, _ string, _ gateway.BuildFunc, status chan *client.SolveStatus) (*client.SolveResponse, error) {
	defer close(s.ended)
	defer close(status)
	<-s.closed
	return nil, context.Canceled
}

func (s *stuckSession) Open(context.Context, Domain) (Session, error) { return s, nil }
func (s *stuckSession) Domains(context.Context) ([]Domain, error)     { return nil, nil }

func TestAnEngineThatIsStuckKeepsNoBuild(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	records, err := record.Open(t.TempDir(), record.Options{})
	require.NoError(t, err)
	defer func() { require.NoError(t, records.Close()) }()
	w, err := records.Create(&agentv1.Build{Tenant: "a", BuildId: "one"})
	require.NoError(t, err)
	spec := &agentv1.BuildSpec{
		Sandbox:  agentv1.SandboxClass_SANDBOX_CLASS_GVISOR,
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: "FROM scratch"}},
	}
	j := &job{key: record.Key{Tenant: "a", ID: "one"}, spec: spec}
	j.writer.Store(w)
	session := &stuckSession{closed: make(chan struct{}), ended: make(chan struct{})}
	s := &solver{cfg: Config{Engines: session, Policy: RulePolicy(func(string) TenantRules { return TenantRules{} }), Platforms: []string{"linux/amd64"}, Logger: slog.New(slog.DiscardHandler), Now: time.Now}, patience: 10 * time.Millisecond}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(&failure.Cancelled{Reason: "enough"})
	result := s.Run(ctx, j)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_CANCELLED, result.GetState())
	close(session.closed)
	<-session.ended
}
