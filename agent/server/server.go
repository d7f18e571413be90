package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/stats"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"

	"github.com/kiln-build/kiln/agent/auth"
)

// Limits of a connection.
const (
	// maxBuildMessage bounds a message of the build API, in bytes.
	maxBuildMessage = 4 << 20
	// maxMessage bounds a message of any other service, in bytes: that of BuildKit's
	// clients.
	maxMessage = 16 << 20
	// maxHeader bounds the metadata of a call, in bytes.
	maxHeader = 64 << 10
	// maxStreams bounds the calls of one connection at one time. A controller watches
	// all builds of a node over one.
	maxStreams = 1024
	// handshakeTimeout bounds what comes before the first call.
	handshakeTimeout = 10 * time.Second
	// idleTimeout closes a connection without calls; clients connect again by
	// themselves.
	idleTimeout = 15 * time.Minute
	// pingEvery and pingTimeout find clients that are gone.
	pingEvery, pingTimeout = time.Minute, 20 * time.Second
	// pingAllowed is the shortest time between a client's own pings.
	pingAllowed = 10 * time.Second
)

// Config says what is served.
type Config struct {
	// Builds is the build API.
	Builds agentv1.BuildServiceServer
	// BuildKit are the options that serve BuildKit's API (engine.Proxy); none: it is
	// not served.
	BuildKit []grpc.ServerOption
	// Auth finds out who calls, from what Credentials proved.
	Auth        *auth.Authenticator
	Credentials credentials.TransportCredentials
	Log         *slog.Logger
	// Metrics is where the server's metrics are registered.
	Metrics prometheus.Registerer
	// Tracer makes spans of calls; nil: none are made.
	Tracer trace.TracerProvider
}

// Server is the gRPC server of an agent. Its life is Serve → Drain → Stop; Drain may
// be left out. Its methods may be called concurrently.
type Server struct {
	grpc   *grpc.Server
	health *health.Server
	drain  *drain
	log    *slog.Logger
}

// New assembles a server. It serves nothing until Serve.
func New(cfg Config) (*Server, error) {
	s := &Server{health: health.NewServer(), drain: newDrain(), log: cfg.Log}
	observer, err := newObserver(cfg.Log, cfg.Metrics)
	if err != nil {
		return nil, err
	}
	opts := []grpc.ServerOption{
		grpc.Creds(logHandshakes(cfg.Credentials, cfg.Log)),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.MaxHeaderListSize(maxHeader),
		grpc.MaxConcurrentStreams(maxStreams), grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout, Time: pingEvery, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingAllowed, PermitWithoutStream: true}),
		// Stop returns when no handler runs any more.
		grpc.WaitForHandlers(true),
		grpc.ChainUnaryInterceptor(observer.unary, recoverUnary(cfg.Log), cfg.Auth.Unary(), identifyUnary, s.drain.unary, limitUnary),
		grpc.ChainStreamInterceptor(observer.stream, recoverStream(cfg.Log), cfg.Auth.Stream(), identifyStream, s.drain.stream, limitStream),
	}
	if cfg.Tracer != nil {
		opts = append(opts, grpc.StatsHandler(otelgrpc.NewServerHandler(
			otelgrpc.WithTracerProvider(cfg.Tracer),
			otelgrpc.WithFilter(func(info *stats.RPCTagInfo) bool { return !isPoll(info.FullMethodName) }),
		)))
	}
	s.grpc = grpc.NewServer(append(opts, cfg.BuildKit...)...)
	agentv1.RegisterBuildServiceServer(s.grpc, cfg.Builds)
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.RegisterV1(s.grpc)
	s.health.SetServingStatus(agentv1.BuildService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	return s, nil
}

// Serve serves listeners, and closes them, until Stop or the first error.
func (s *Server) Serve(listeners ...net.Listener) error {
	if len(listeners) == 0 {
		return errors.New("serve: no listener")
	}
	errs := make([]error, len(listeners))
	var all sync.WaitGroup
	for i, l := range listeners {
		all.Go(func() {
			if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				errs[i] = fmt.Errorf("serve %s: %w", l.Addr(), err)
				s.grpc.Stop()
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// Drain tells clients to go elsewhere: health is NOT_SERVING and BuildKit's clients
// can start nothing. It waits until what BuildKit's clients run has ended, or ctx;
// the error then says how many builds are left. Calls about builds are served on.
func (s *Server) Drain(ctx context.Context) error {
	s.health.Shutdown()
	return s.drain.wait(ctx)
}

// Stop ends Serve. It lets calls end until ctx does, and then ends them.
func (s *Server) Stop(ctx context.Context) {
	s.health.Shutdown()
	graceful := make(chan struct{})
	go func() {
		defer close(graceful)
		s.grpc.GracefulStop()
	}()
	select {
	case <-graceful:
	case <-ctx.Done():
		s.grpc.Stop()
		<-graceful
	}
}
