package main

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/cmd/internal/program"
)

// flushTimeout bounds how long the last spans may take.
const flushTimeout = 3 * time.Second

// tracing is where spans go. Its provider is nil when nothing is traced.
type tracing struct {
	provider trace.TracerProvider
	// stop sends what is left.
	stop func() error
}

// startTracing connects when the first spans are sent.
func startTracing(ctx context.Context, cfg config.Tracing, node string) (*tracing, error) {
	// Callers' traces are carried on even when none are sent from here.
	otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}))
	if cfg.Endpoint == "" {
		return &tracing{stop: func() error { return nil }}, nil
	}
	opts := []otlptracegrpc.Option{otlptracegrpc.WithEndpoint(cfg.Endpoint)}
	if cfg.Insecure {
		opts = append(opts, otlptracegrpc.WithInsecure())
	}
	exporter, err := otlptracegrpc.New(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("start tracing: %w", err)
	}
	const million = 1e6
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(float64(*cfg.SamplingRatePerMillion)/million))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "kiln-agent"), attribute.String("service.version", program.Version()), attribute.String("k8s.node.name", node),
		)),
	)
	return &tracing{provider: provider, stop: func() error {
		flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
		defer cancel()
		if err := provider.Shutdown(flush); err != nil {
			// Spans that nobody collects are no failure of the agent.
			otel.Handle(err)
		}
		return nil
	}}, nil
}
