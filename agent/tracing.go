package agent

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// traced makes a build a span, in the trace of the call that started it. The
// engine's spans are below it.
type traced struct {
	next   runner
	tracer trace.Tracer
}

func (r *traced) Run(ctx context.Context, j *job) *agentv1.BuildResult {
	ctx, span := r.tracer.Start(trace.ContextWithRemoteSpanContext(ctx, j.caller), "build", trace.WithAttributes(
		attribute.String("kiln.tenant", j.key.Tenant), attribute.String("kiln.build_id", j.key.ID),
		attribute.String("kiln.sandbox", className(j.spec.GetSandbox())),
	))
	defer span.End()
	result := r.next.Run(ctx, j)
	span.SetAttributes(
		attribute.String("kiln.state", result.GetState().String()), attribute.Int("kiln.steps", len(result.GetSteps())),
	)
	if f := result.GetFailure(); f != nil {
		span.SetAttributes(attribute.String("kiln.reason", f.GetReason().String()))
		span.SetStatus(codes.Error, f.GetReason().String())
	}
	return result
}
