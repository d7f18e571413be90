package main

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/kiln-build/kiln/agent/config"
)

// startTracing returns where spans go, or nil when tracing is not configured. It
// connects when the first spans are sent.
func startTracing(ctx context.Context, cfg config.Tracing, node string) (*sdktrace.TracerProvider, error) {
	// Callers' traces are carried on even when none are sent from here.
	otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}))
	if cfg.Endpoint == "" {
		return nil, nil
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
	return sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(float64(*cfg.SamplingRatePerMillion)/million))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "kiln-agent"), attribute.String("service.version", version()), attribute.String("k8s.node.name", node),
		)),
	), nil
}
