package server

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"

	"github.com/kiln-build/kiln/agent/auth"
	"github.com/kiln-build/kiln/agent/engine"
)

func TestServices(t *testing.T) {
	f := start(t, nil)
	conn := f.dial(t)
	ctx := short(t)
	info, err := agentv1.NewBuildServiceClient(conn).GetInfo(ctx, &agentv1.GetInfoRequest{})
	require.NoError(t, err)
	require.Equal(t, "uid:0", info.Node)
	for _, service := range []string{"", "kiln.agent.v1.BuildService"} {
		h, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
		require.NoError(t, err)
		require.Equal(t, healthpb.HealthCheckResponse_SERVING, h.Status)
	}
	r, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	require.NoError(t, err)
	require.NoError(t, r.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}))
	list, err := r.Recv()
	require.NoError(t, err)
	require.Contains(t, list.String(), "kiln.agent.v1.BuildService")
	require.NoError(t, r.CloseSend())
}

// TestStrangersReachNothing calls every kind of service without an identity.
func TestStrangersReachNothing(t *testing.T) {
	f := start(t, func(c *Config) {
		c.Credentials = stranger{c.Credentials}
		c.BuildKit = engine.Proxy(func(context.Context) (*engine.Engine, func(), error) { panic("reached") })
	})
	conn := f.dial(t)
	for _, method := range []string{
		agentv1.BuildService_GetInfo_FullMethodName, agentv1.BuildService_WatchBuild_FullMethodName, healthpb.Health_Check_FullMethodName,
		healthpb.Health_Watch_FullMethodName, reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName,
		"/moby.buildkit.v1.Control/Info", "/moby.buildkit.v1.Control/Session", "/no.such.Service/Method",
	} {
		err := conn.Invoke(short(t), method, &emptypb.Empty{}, &emptypb.Empty{})
		require.Equal(t, codes.PermissionDenied, status.Code(err), "%s: %v", method, err)
	}
	rec := f.log.find(t, `"msg":"call"`, "Control/Info")
	require.Equal(t, "WARN", rec["level"])
	require.Equal(t, "PermissionDenied", rec["code"])
}

// TestProxySeesIdentity checks that calls of BuildKit's services pass the
// interceptors on their way to pick.
func TestProxySeesIdentity(t *testing.T) {
	f := start(t, func(c *Config) {
		c.BuildKit = engine.Proxy(func(ctx context.Context) (*engine.Engine, func(), error) {
			id, ok := auth.FromContext(ctx)
			return nil, nil, status.Errorf(codes.ResourceExhausted, "%s %v", id.Name, ok)
		})
	})
	err := f.dial(t).Invoke(short(t), "/moby.buildkit.v1.Control/Info", &emptypb.Empty{}, &emptypb.Empty{})
	require.Equal(t, codes.ResourceExhausted, status.Code(err))
	require.Equal(t, "uid:0 true", status.Convert(err).Message())
	err = f.dial(t).Invoke(short(t), "/no.such.Service/Method", &emptypb.Empty{}, &emptypb.Empty{})
	require.Equal(t, codes.Unimplemented, status.Code(err))

	f = start(t, nil)
	err = f.dial(t).Invoke(short(t), "/moby.buildkit.v1.Control/Info", &emptypb.Empty{}, &emptypb.Empty{})
	require.Equal(t, codes.Unimplemented, status.Code(err))
}

func TestPanicEndsOneCall(t *testing.T) {
	f := start(t, func(c *Config) {
		c.BuildKit = engine.Proxy(func(context.Context) (*engine.Engine, func(), error) { panic("stream") })
	})
	conn := f.dial(t)
	_, err := agentv1.NewBuildServiceClient(conn).StartBuild(short(t), &agentv1.StartBuildRequest{})
	require.Equal(t, codes.Internal, status.Code(err))
	require.NotContains(t, status.Convert(err).Message(), "nil pointer")
	require.Contains(t, f.log.find(t, "a call panicked", "nil pointer")["stack"], "StartBuild")
	require.Equal(t, "ERROR", f.log.find(t, `"msg":"call"`, "StartBuild")["level"])
	err = conn.Invoke(short(t), "/moby.buildkit.v1.Control/Info", &emptypb.Empty{}, &emptypb.Empty{})
	require.Equal(t, codes.Internal, status.Code(err))
	_, err = agentv1.NewBuildServiceClient(conn).GetInfo(short(t), &agentv1.GetInfoRequest{})
	require.NoError(t, err)
}

func TestMessageSizes(t *testing.T) {
	f := start(t, nil)
	c := agentv1.NewBuildServiceClient(f.dial(t))
	big := bytes.Repeat([]byte("x"), maxBuildMessage)
	_, err := c.StartBuild(short(t), &agentv1.StartBuildRequest{Credentials: &agentv1.Credentials{Secrets: map[string][]byte{"a": big}}})
	require.Equal(t, codes.ResourceExhausted, status.Code(err))
	require.Contains(t, status.Convert(err).Message(), "UploadSource")
	up, err := c.UploadSource(short(t))
	require.NoError(t, err)
	_ = up.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Data{Data: big}})
	_, err = up.CloseAndRecv()
	require.Equal(t, codes.ResourceExhausted, status.Code(err))
	huge := bytes.Repeat([]byte("x"), maxMessage)
	_, err = c.StartBuild(short(t), &agentv1.StartBuildRequest{Credentials: &agentv1.Credentials{Secrets: map[string][]byte{"a": huge}}})
	require.Equal(t, codes.ResourceExhausted, status.Code(err))
	require.NotContains(t, f.log.String(), "xxxx", "no body in the log")
}

func TestCallsAreLoggedAndCounted(t *testing.T) {
	f := start(t, nil)
	conn := f.dial(t)
	_, err := agentv1.NewBuildServiceClient(conn).GetInfo(short(t), &agentv1.GetInfoRequest{})
	require.NoError(t, err)
	_, err = agentv1.NewBuildServiceClient(conn).Prune(short(t), &agentv1.PruneRequest{Tenant: "secret-request"})
	require.Equal(t, codes.Unimplemented, status.Code(err))
	require.Equal(t, "DEBUG", f.log.find(t, `"msg":"call"`, "GetInfo")["level"])
	rec := f.log.find(t, `"msg":"call"`, "Prune")
	require.Equal(t, "INFO", rec["level"])
	require.Equal(t, map[string]any{"name": "uid:0", "role": "admin", "tenant": "default"}, rec["caller"])
	require.NotContains(t, f.log.String(), "secret-request")
	require.NoError(t, testutil.GatherAndCompare(f.metrics, strings.NewReader(`
# HELP kiln_agent_grpc_requests_total Calls that have ended, by their gRPC code.
# TYPE kiln_agent_grpc_requests_total counter
kiln_agent_grpc_requests_total{code="OK",method="GetInfo",service="kiln.agent.v1.BuildService"} 1
kiln_agent_grpc_requests_total{code="Unimplemented",method="Prune",service="kiln.agent.v1.BuildService"} 1
`), "kiln_agent_grpc_requests_total"))
}

func TestCallersCannotMakeLabels(t *testing.T) {
	tests := map[string][2]string{
		"/kiln.agent.v1.BuildService/GetInfo": {"kiln.agent.v1.BuildService", "GetInfo"},
		"/moby.buildkit.v1.Control/Solve":     {"moby.buildkit.v1.Control", "Solve"},
		"/grpc.health.v1.Health/Check":        {"grpc.health.v1.Health", "Check"},
		"/moby.buildkit.v1.Control/Made":      {unknown, unknown},
		"/made.Up/Solve":                      {unknown, unknown},
		"/kiln.agent.v1.Build/GetInfo":        {unknown, unknown},
		"":                                    {unknown, unknown},
		"/\xff/\xff":                          {unknown, unknown},
	}
	for in, want := range tests {
		service, method := labels(in)
		require.Equal(t, want, [2]string{service, method}, in)
	}
}

func TestSpans(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	f := start(t, func(c *Config) { c.Tracer = sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)) })
	c := agentv1.NewBuildServiceClient(f.dial(t))
	_, err := c.GetInfo(short(t), &agentv1.GetInfoRequest{})
	require.NoError(t, err)
	_, err = c.Prune(short(t), &agentv1.PruneRequest{})
	require.Error(t, err)
	require.Eventually(t, func() bool { return len(spans.Ended()) == 1 }, 5*time.Second, 5*time.Millisecond)
	require.Equal(t, "kiln.agent.v1.BuildService/Prune", spans.Ended()[0].Name())
}

// TestDrain has one build of a stock client run while the server drains.
func TestDrain(t *testing.T) {
	running, end := make(chan struct{}, 1), make(chan struct{})
	f := start(t, func(c *Config) {
		c.BuildKit = []grpc.ServerOption{grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			running <- struct{}{}
			<-end
			return ss.SendMsg(&emptypb.Empty{})
		})}
	})
	conn := f.dial(t)
	watch, err := agentv1.NewBuildServiceClient(conn).WatchBuild(short(t), &agentv1.WatchBuildRequest{})
	require.NoError(t, err)
	solved := make(chan error, 1)
	go func() { solved <- conn.Invoke(context.Background(), solveMethod, &emptypb.Empty{}, &emptypb.Empty{}) }()
	<-running

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	require.ErrorContains(t, f.server.Drain(ctx), "wait for 1 builds")
	h, err := healthpb.NewHealthClient(conn).Check(short(t), &healthpb.HealthCheckRequest{})
	require.NoError(t, err)
	require.Equal(t, healthpb.HealthCheckResponse_NOT_SERVING, h.Status)
	for _, method := range []string{solveMethod, sessionMethod} {
		err = conn.Invoke(short(t), method, &emptypb.Empty{}, &emptypb.Empty{})
		require.Equal(t, codes.Unavailable, status.Code(err), method)
	}
	_, err = agentv1.NewBuildServiceClient(f.dial(t)).GetInfo(short(t), &agentv1.GetInfoRequest{})
	require.NoError(t, err, "new connections are served on")

	close(end)
	require.NoError(t, <-solved)
	require.NoError(t, f.server.Drain(short(t)))
	require.NoError(t, f.server.Drain(short(t)), "again")

	stopped := make(chan struct{})
	go func() { f.server.Stop(context.Background()); close(stopped) }()
	close(f.builds.hold)
	_, err = watch.Recv()
	require.ErrorIs(t, err, io.EOF, "streams may end by themselves")
	<-stopped
}

func TestStopEndsCallsInTime(t *testing.T) {
	f := start(t, nil)
	watch, err := agentv1.NewBuildServiceClient(f.dial(t)).WatchBuild(short(t), &agentv1.WatchBuildRequest{})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	f.server.Stop(ctx)
	_, err = watch.Recv()
	require.Error(t, err)
}

func TestServeNeedsAListener(t *testing.T) {
	f := start(t, nil)
	require.ErrorContains(t, f.server.Serve(), "no listener")
}
