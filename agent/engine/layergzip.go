package engine

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/result"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/worker"
)

// BuildKit compresses layers with the standard library's gzip. That is most of the
// time of a first push. The one here writes the same format several times faster, and
// takes what cannot be compressed as it is.

// layerGzip is BuildKit's gzip with another compressor.
type layerGzip struct {
	compression.Type
}

// Compress implements compression.Type.
func (layerGzip) Compress(_ context.Context, cfg compression.Config) (compression.Compressor, compression.Finalizer) {
	level := gzip.DefaultCompression
	if cfg.Level != nil {
		level = *cfg.Level
	}
	return func(dest io.Writer, _ string) (io.WriteCloser, error) {
		w, err := gzip.NewWriterLevel(dest, level)
		if err != nil {
			return nil, fmt.Errorf("compress layer: %w", err)
		}
		return w, nil
	}, nil
}

// withLayerGzip returns cfg with layerGzip where it says gzip.
func withLayerGzip(cfg cacheconfig.RefConfig) cacheconfig.RefConfig {
	if cfg.Compression.Type == compression.Gzip {
		cfg.Compression.Type = layerGzip{compression.Gzip}
	}
	return cfg
}

// compressingWorker is a worker whose layers are compressed by layerGzip.
type compressingWorker struct {
	worker.Worker
	// attesting is held while an attestation is made. The exports of a build run at
	// once, and BuildKit has one provenance for all of them, which it changes whenever
	// one asks for it.
	attesting *sync.Mutex
}

// GetRemotes is what BuildKit asks for layers that go into an exported cache.
func (w compressingWorker) GetRemotes(ctx context.Context, ref cache.ImmutableRef, create bool, cfg cacheconfig.RefConfig, all bool, g session.Group) ([]*solver.Remote, error) {
	if ref == nil {
		return nil, nil
	}
	return ref.GetRemotes(ctx, create, withLayerGzip(cfg), all, g)
}

// Exporter implements worker.Worker.
func (w compressingWorker) Exporter(name string, sm *session.Manager) (exporter.Exporter, error) {
	e, err := w.Worker.Exporter(name, sm)
	if err != nil {
		return nil, err
	}
	return compressingExporter{e, w.attesting}, nil
}

type compressingExporter struct {
	exporter.Exporter
	attesting *sync.Mutex
}

func (e compressingExporter) Resolve(ctx context.Context, id int, attrs map[string]string) (exporter.ExporterInstance, error) {
	i, err := e.Exporter.Resolve(ctx, id, attrs)
	if err != nil {
		return nil, err
	}
	return compressingInstance{i, e.attesting}, nil
}

type compressingInstance struct {
	exporter.ExporterInstance
	attesting *sync.Mutex
}

func (i compressingInstance) Export(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo) (map[string]string, exporter.FinalizeFunc, exporter.DescriptorReference, error) {
	// A reference stays nil where it is nil, which has a meaning to exporters.
	refs, err := result.ConvertResult(src, func(ref cache.ImmutableRef) (cache.ImmutableRef, error) {
		return compressingRef{ref}, nil
	})
	if err != nil {
		return nil, nil, nil, err
	}
	for _, list := range refs.Attestations {
		for j := range list {
			if content := list[j].ContentFunc; content != nil {
				list[j].ContentFunc = func(ctx context.Context) ([]byte, error) {
					i.attesting.Lock()
					defer i.attesting.Unlock()
					return content(ctx)
				}
			}
		}
	}
	return i.ExporterInstance.Export(ctx, refs, info)
}

// compressingRef is a snapshot of a build's result.
type compressingRef struct {
	cache.ImmutableRef
}

func (r compressingRef) GetRemotes(ctx context.Context, create bool, cfg cacheconfig.RefConfig, all bool, g session.Group) ([]*solver.Remote, error) {
	return r.ImmutableRef.GetRemotes(ctx, create, withLayerGzip(cfg), all, g)
}

func (r compressingRef) Clone() cache.ImmutableRef {
	return compressingRef{r.ImmutableRef.Clone()}
}
