package server

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"

	"github.com/kiln-build/kiln/agent/auth"
)

// observer counts and logs calls. It is the outermost interceptor, so that it also
// sees the calls that others refuse.
type observer struct {
	log      *slog.Logger
	total    *prometheus.CounterVec
	duration *prometheus.HistogramVec
	running  *prometheus.GaugeVec
}

func newObserver(log *slog.Logger, reg prometheus.Registerer) (*observer, error) {
	o := &observer{
		log: log,
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kiln_agent_grpc_requests_total", Help: "Calls that have ended, by their gRPC code.",
		}, []string{"service", "method", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kiln_agent_grpc_request_duration_seconds", Help: "Time from the start of a call to its end; streams last as long as their client stays.",
			Buckets: []float64{.001, .005, .025, .1, .5, 2, 10, 60, 600, 3600},
		}, []string{"service", "method"}),
		running: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "kiln_agent_grpc_requests_in_flight", Help: "Calls that are being served.",
		}, []string{"service", "method"}),
	}
	for _, c := range []prometheus.Collector{o.total, o.duration, o.running} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return o, nil
}

// call is what becomes known of a call while it is served.
type call struct {
	identity auth.Identity
}

type callKey struct{}

func (o *observer) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	ctx, end := o.begin(ctx, info.FullMethod)
	defer func() { end(err) }()
	return next(ctx, req)
}

func (o *observer) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	ctx, end := o.begin(ss.Context(), info.FullMethod)
	defer func() { end(err) }()
	return next(srv, &contextStream{ss, ctx})
}

// contextStream is a stream with another context.
type contextStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *contextStream) Context() context.Context { return s.ctx }

func (o *observer) begin(ctx context.Context, fullMethod string) (context.Context, func(error)) {
	start := time.Now()
	service, method := labels(fullMethod)
	running := o.running.WithLabelValues(service, method)
	running.Inc()
	c := &call{}
	ctx = context.WithValue(ctx, callKey{}, c)
	return ctx, func(err error) {
		code, took := status.Code(err), time.Since(start)
		running.Dec()
		o.total.WithLabelValues(service, method, code.String()).Inc()
		o.duration.WithLabelValues(service, method).Observe(took.Seconds())
		level := levelOf(fullMethod, code)
		if !o.log.Enabled(ctx, level) {
			return
		}
		attrs := []slog.Attr{
			slog.String("method", shown(fullMethod)), slog.String("code", code.String()),
			slog.Float64("seconds", took.Seconds()), slog.Any("caller", c.identity),
		}
		if p, ok := peer.FromContext(ctx); ok && p.Addr.Network() == "tcp" {
			attrs = append(attrs, slog.String("peer", p.Addr.String()))
		}
		if err != nil {
			attrs = append(attrs, slog.String("error", shown(status.Convert(err).Message())))
		}
		o.log.LogAttrs(ctx, level, "call", attrs...)
	}
}

// identifyUnary runs after authentication and tells the observer who calls.
func identifyUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	note(ctx)
	return next(ctx, req)
}

func identifyStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	note(ss.Context())
	return next(srv, ss)
}

func note(ctx context.Context) {
	id, _ := auth.FromContext(ctx)
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.identity = id
	}
}

// unknown stands for services and methods that are not compiled in: a label must
// not be what a caller makes up.
const unknown = "unknown"

// labels returns the service and method of a call.
func labels(fullMethod string) (service, method string) {
	service, method, ok := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	if !ok {
		return unknown, unknown
	}
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return unknown, unknown
	}
	sd, ok := d.(protoreflect.ServiceDescriptor)
	if !ok || sd.Methods().ByName(protoreflect.Name(method)) == nil {
		return unknown, unknown
	}
	return service, method
}

// polls are the calls that clients repeat.
var polls = []string{
	agentv1.BuildService_Probe_FullMethodName, agentv1.BuildService_GetInfo_FullMethodName, agentv1.BuildService_GetBuild_FullMethodName,
	agentv1.BuildService_ListBuilds_FullMethodName, agentv1.BuildService_DiskUsage_FullMethodName,
}

func isPoll(fullMethod string) bool {
	return strings.HasPrefix(fullMethod, "/grpc.") || slices.Contains(polls, fullMethod)
}

func levelOf(fullMethod string, code codes.Code) slog.Level {
	switch code {
	case codes.OK:
		if isPoll(fullMethod) {
			return slog.LevelDebug
		}
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return slog.LevelError
	case codes.Unauthenticated, codes.PermissionDenied:
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// maxShown bounds text of callers in the log, in bytes.
const maxShown = 512

func shown(s string) string {
	if len(s) > maxShown {
		s = s[:maxShown] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}
