// Package agenttest serves an agent to tests, which call it as different callers,
// and checks what every build promises.
package agenttest

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/auth"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// CheckGoroutines fails the test when goroutines of the agent are left at its end.
// Tests with real engines do not use it: those leave some that end by themselves
// after a while.
func CheckGoroutines(t *testing.T) {
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

// timeout bounds one test's calls.
const timeout = 2 * time.Minute

// AllClasses says that every class of sandbox works.
func AllClasses() []*agentv1.SandboxInfo {
	return []*agentv1.SandboxInfo{
		{Class: agentv1.SandboxClass_SANDBOX_CLASS_GVISOR, Available: true},
		{Class: agentv1.SandboxClass_SANDBOX_CLASS_USERNS, Available: true},
	}
}

// Anything is a policy that allows everything.
func Anything(string) agent.TenantRules {
	return agent.TenantRules{Rules: []policy.Rules{{Name: "test"}}}
}

// New returns an agent over engines. change may change its configuration.
func New(t *testing.T, engines agent.Engines, change func(*agent.Config)) *agent.Agent {
	t.Helper()
	cfg := agent.Config{Root: t.TempDir(), Node: "node-1", Engines: engines, Policy: agent.RulePolicy(Anything), Sandboxes: AllClasses}
	if change != nil {
		change(&cfg)
	}
	a, err := agent.New(cfg)
	require.NoError(t, err)
	return a
}

// identityKey is the metadata by which a test says who calls.
const identityKey = "test-identity"

// identities are the callers of tests.
var identities = map[string]auth.Identity{
	"a":          {Name: "test:a", Role: auth.RoleTenant, Tenant: "a"},
	"b":          {Name: "test:b", Role: auth.RoleTenant, Tenant: "b"},
	"controller": {Name: "test:controller", Role: auth.RoleController},
}

// As returns a context of a caller.
func As(ctx context.Context, who string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, identityKey, who)
}

func authenticate(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(identityKey); len(v) == 1 {
		if id, ok := identities[v[0]]; ok {
			return auth.NewContext(ctx, id)
		}
	}
	return ctx
}

type authenticated struct{ grpc.ServerStream }

func (s authenticated) Context() context.Context { return authenticate(s.ServerStream.Context()) }

// Serve serves an agent, as its server does, and returns a client of it. Both end
// with the test, before the agent's directory is removed.
func Serve(t *testing.T, a *agent.Agent) agentv1.BuildServiceClient {
	t.Helper()
	c, stop := ServeUntil(t, a)
	t.Cleanup(func() {
		stop()
		require.NoError(t, a.Close())
	})
	return c
}

func ServeUntil(t *testing.T, a *agent.Agent) (agentv1.BuildServiceClient, func()) {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	s := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(authenticate(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, authenticated{ss})
		}),
	)
	agentv1.RegisterBuildServiceServer(s, a)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	require.NoError(t, err)
	return agentv1.NewBuildServiceClient(conn), func() {
		require.NoError(t, conn.Close())
		s.Stop()
		require.NoError(t, <-served)
	}
}

func Context(t *testing.T, who string) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	t.Cleanup(cancel)
	return As(ctx, who)
}

// Dockerfile is a spec of a Dockerfile.
func Dockerfile(text string) *agentv1.BuildSpec {
	return &agentv1.BuildSpec{Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: text}}}
}

// Watch returns all events of a build from offset to its end.
func Watch(t *testing.T, ctx context.Context, c agentv1.BuildServiceClient, id string, offset uint64) []*agentv1.Event {
	t.Helper()
	stream, err := c.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: id, Offset: offset})
	require.NoError(t, err)
	var all []*agentv1.Event
	for {
		msg, err := stream.Recv()
		if err == io.EOF {
			return all
		}
		require.NoError(t, err)
		all = append(all, msg.GetEvent())
	}
}

// CheckEvents fails unless events are numbered from first without gaps, and end with
// the only result, which it returns.
func CheckEvents(t *testing.T, events []*agentv1.Event, first uint64) *agentv1.BuildResult {
	t.Helper()
	require.NotEmpty(t, events)
	for i, ev := range events {
		require.Equal(t, first+uint64(i), ev.GetOffset())
		require.Equal(t, i == len(events)-1, ev.GetResult() != nil, "event %d is %v", i, ev)
	}
	return events[len(events)-1].GetResult()
}

// Output is what the steps of a build wrote.
func Output(events []*agentv1.Event) string {
	var b bytes.Buffer
	for _, ev := range events {
		b.Write(ev.GetLog().GetData())
	}
	return b.String()
}

// BusyboxTar is an archive with busybox and more files.
func BusyboxTar(t *testing.T, files map[string]string) []byte {
	t.Helper()
	data, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "install Debian's busybox-static")
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(name string, content []byte) {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}))
		_, err := w.Write(content)
		require.NoError(t, err)
	}
	add("busybox", data)
	for name, content := range files {
		add(name, []byte(content))
	}
	require.NoError(t, w.Close())
	return buf.Bytes()
}

// Send uploads an archive in pieces.
func Send(ctx context.Context, c agentv1.BuildServiceClient, head *agentv1.UploadHeader, data []byte) (*agentv1.UploadSourceResponse, error) {
	stream, err := c.UploadSource(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Header{Header: head}})
	for err == nil && len(data) > 0 {
		piece := data[:min(len(data), 512<<10)]
		data = data[len(piece):]
		err = stream.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Data{Data: piece}})
	}
	return stream.CloseAndRecv()
}

// SendAll uploads an archive as the caller's tenant and returns its digest.
func SendAll(t *testing.T, ctx context.Context, c agentv1.BuildServiceClient, data []byte) string {
	t.Helper()
	d := digest.FromBytes(data).String()
	resp, err := Send(ctx, c, &agentv1.UploadHeader{Digest: d, Size: int64(len(data))}, data)
	require.NoError(t, err)
	require.Equal(t, d, resp.GetDigest())
	return d
}

// RepoBin is where the Makefile puts the OCI runtimes.
func RepoBin(t *testing.T, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "..", "bin", name))
	require.NoError(t, err)
	_, err = os.Stat(p)
	require.NoError(t, err, "run `make build` first")
	return p
}

// Uploaded is a spec of the Dockerfile in an archive that was uploaded.
func Uploaded(digest string) *agentv1.BuildSpec {
	return &agentv1.BuildSpec{
		Source:   &agentv1.Source{From: &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: digest}}},
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}},
	}
}
