package engine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/cache/remotecache"
	registryremotecache "github.com/moby/buildkit/cache/remotecache/registry"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter"
	imageexporter "github.com/moby/buildkit/exporter/containerimage"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/resolver"
	"github.com/moby/buildkit/util/resolver/limited"
	"github.com/moby/buildkit/util/tracing"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// A build may say that the registry of an output or of a cache is insecure: plain HTTP,
// or a certificate that does not verify. BuildKit then makes clients of its own, for which
// no policy holds. What is in this file stands in for that wherever there is a policy.

// insecureKey is the attribute by which a build says so.
var insecureKey = string(exptypes.OptKeyInsecure)

// takeInsecure returns attrs without insecureKey, and what that was.
func takeInsecure(attrs map[string]string) (map[string]string, bool, error) {
	v, ok := attrs[insecureKey]
	if !ok {
		return attrs, false, nil
	}
	attrs = maps.Clone(attrs)
	delete(attrs, insecureKey)
	if v == "" {
		return attrs, true, nil
	}
	on, err := strconv.ParseBool(v)
	if err != nil {
		return nil, false, fmt.Errorf("%s: want true or false, not %q", insecureKey, v)
	}
	return attrs, on, nil
}

// insecure returns hosts whose registries need no TLS, nor a certificate that verifies.
// What they connect to obeys the policy.
func (f *domainFetching) insecure(hosts docker.RegistryHosts) docker.RegistryHosts {
	return func(host string) ([]docker.RegistryHost, error) {
		found, err := hosts(host)
		if err != nil {
			return nil, err
		}
		out := slices.Clone(found)
		for i := range out {
			out[i].Scheme, out[i].Client = "https", &http.Client{Transport: tracing.NewTransport(docker.NewHTTPFallback(f.unverified))}
		}
		return out, nil
	}
}

// unverifying returns t for servers whose certificates do not verify.
func unverifying(t *http.Transport) *http.Transport {
	t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // the build asks for it
	return t
}

// policedWorker is a worker whose images go to insecure registries under the policy.
type policedWorker struct {
	worker.Worker
	base  *base.Worker
	fetch *domainFetching
	hosts docker.RegistryHosts
}

// Exporter implements worker.Worker.
func (w policedWorker) Exporter(name string, sm *session.Manager) (exporter.Exporter, error) {
	e, err := w.Worker.Exporter(name, sm)
	if err != nil || name != client.ExporterImage || w.fetch == nil {
		return e, err
	}
	writer, err := imageexporter.NewImageWriter(imageexporter.WriterOpt{
		Snapshotter: w.base.Snapshotter, ContentStore: w.ContentStore(), Applier: w.base.Applier, Differ: w.base.Differ,
	})
	if err != nil {
		return nil, fmt.Errorf("make writer of images: %w", err)
	}
	insecure, err := imageexporter.New(imageexporter.Opt{
		Images: w.base.ImageStore, SessionManager: sm, ImageWriter: writer, RegistryHosts: w.fetch.insecure(w.hosts), LeaseManager: w.LeaseManager(),
	})
	if err != nil {
		return nil, fmt.Errorf("make exporter of images: %w", err)
	}
	return policedExporter{e, insecure}, nil
}

type policedExporter struct {
	exporter.Exporter
	insecure exporter.Exporter
}

// Resolve implements exporter.Exporter.
func (e policedExporter) Resolve(ctx context.Context, id int, attrs map[string]string) (exporter.ExporterInstance, error) {
	rest, insecure, err := takeInsecure(attrs)
	if err != nil {
		return nil, err
	}
	if insecure {
		return e.insecure.Resolve(ctx, id, rest)
	}
	return e.Exporter.Resolve(ctx, id, rest)
}

// cacheExporter returns what exports caches to registries.
func (f *domainFetching) cacheExporter(sm *session.Manager, hosts docker.RegistryHosts) remotecache.ResolveCacheExporterFunc {
	verified := registryremotecache.ResolveCacheExporterFunc(sm, hosts)
	if f == nil {
		return verified
	}
	unverified := registryremotecache.ResolveCacheExporterFunc(sm, f.insecure(hosts))
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Exporter, error) {
		rest, insecure, err := takeInsecure(attrs)
		if err != nil {
			return nil, err
		}
		if insecure {
			return unverified(ctx, g, rest)
		}
		return verified(ctx, g, rest)
	}
}

// cacheImporter returns what imports caches from registries.
func (f *domainFetching) cacheImporter(sm *session.Manager, store content.Store, hosts docker.RegistryHosts) remotecache.ResolveCacheImporterFunc {
	verified := registryremotecache.ResolveCacheImporterFunc(sm, store, hosts)
	if f == nil {
		return verified
	}
	hosts = f.insecure(hosts)
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Importer, ocispecs.Descriptor, error) {
		rest, insecure, err := takeInsecure(attrs)
		if err != nil {
			return nil, ocispecs.Descriptor{}, err
		}
		if !insecure {
			return verified(ctx, g, rest)
		}
		named, err := reference.ParseNormalizedNamed(rest["ref"])
		if err != nil {
			return nil, ocispecs.Descriptor{}, fmt.Errorf("import cache: ref %q: %w", rest["ref"], err)
		}
		if len(session.AllSessionIDs(g)) == 0 {
			return nil, ocispecs.Descriptor{}, errors.New("import cache: an insecure registry needs a client's session")
		}
		p := &insecureCache{ref: reference.TagNameOnly(named).String(), store: store}
		// BuildKit keeps clients by the name of an image, for all. Those of a push are kept
		// by session too, so that nobody else's pull takes one that verifies nothing.
		p.resolver = resolver.DefaultPool.GetResolver(hosts, p.ref, resolver.ScopeType{Push: true, Insecure: true}, sm, g)
		var desc ocispecs.Descriptor
		if p.ref, desc, err = p.resolver.Resolve(ctx, p.ref); err != nil {
			return nil, ocispecs.Descriptor{}, err
		}
		return remotecache.NewImporter(p), desc, nil
	}
}

// insecureCache reads a cache from an insecure registry, as BuildKit's own provider does
// from others.
type insecureCache struct {
	resolver *resolver.Resolver
	ref      string
	store    content.Store
}

var _ remotecache.DistributionSourceLabelSetter = (*insecureCache)(nil)

// ReaderAt implements content.Provider.
func (c *insecureCache) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	fetcher, err := c.resolver.Fetcher(ctx, c.ref)
	if err != nil {
		return nil, err
	}
	return contentutil.FromFetcher(limited.Default.WrapFetcher(fetcher, c.ref)).ReaderAt(ctx, desc)
}

// ProviderForSession has the credentials of another session read the cache.
func (c *insecureCache) ProviderForSession(g session.Group) content.Provider {
	other := *c
	other.resolver = c.resolver.WithSession(g)
	return &other
}

// SetDistributionSourceLabel implements remotecache.DistributionSourceLabelSetter.
func (c *insecureCache) SetDistributionSourceLabel(ctx context.Context, d digest.Digest) error {
	label, err := docker.AppendDistributionSourceLabel(c.store, c.ref)
	if err == nil {
		_, err = label(ctx, ocispecs.Descriptor{Digest: d})
	}
	return err
}

// SetDistributionSourceAnnotation implements remotecache.DistributionSourceLabelSetter.
func (c *insecureCache) SetDistributionSourceAnnotation(desc ocispecs.Descriptor) ocispecs.Descriptor {
	desc.Annotations = maps.Clone(desc.Annotations)
	if desc.Annotations == nil {
		desc.Annotations = map[string]string{}
	}
	desc.Annotations["containerd.io/distribution.source.ref"] = c.ref
	return desc
}
