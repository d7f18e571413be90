package engine

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/diff/apply"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/gc"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/cache/remotecache"
	inlineremotecache "github.com/moby/buildkit/cache/remotecache/inline"
	localremotecache "github.com/moby/buildkit/cache/remotecache/local"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/session"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/util/db/boltutil"
	"github.com/moby/buildkit/util/disk"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/version"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	"github.com/moby/buildkit/worker/label"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// historyEntries is how many finished builds the engine remembers.
const historyEntries int64 = 50

// Files of a domain's own state.
const (
	// refsFile has BuildKit's metadata of what is cached.
	refsFile = "refs.db"
	// keysFile has the keys of the step cache.
	keysFile = "cache.db"
	// historyFile has BuildKit's record of builds.
	historyFile = "history.db"
)

// assemble gives e the solver of a domain whose own state is in dir, and what keeps its
// cache within bounds.
func (n *Node) assemble(ctx context.Context, e *Engine, dir string, d Domain) error {
	sessions, err := session.NewManager()
	if err != nil {
		return fmt.Errorf("make session manager: %w", err)
	}
	refs, err := metadata.NewStore(filepath.Join(dir, refsFile))
	if err != nil {
		return fmt.Errorf("open reference metadata: %w", err)
	}
	e.opened = append(e.opened, refs)
	fetches, hosts := n.fetchesOf(d)
	w, err := n.newWorker(ctx, dir, d, e.images, hosts, refs)
	if err != nil {
		return err
	}
	if err := fetches.sources(w, hosts); err != nil {
		return err
	}
	workers := &worker.Controller{}
	warm := sync.OnceFunc(func() { n.runtimes.warm([]sandbox.Class{d.Sandbox}) })
	steps := vertexWorker{w, n.runtimes.expected, warm}
	if err := workers.Add(compressingWorker{policedWorker{steps, w, fetches, hosts}, &sync.Mutex{}}); err != nil {
		return fmt.Errorf("add worker: %w", err)
	}
	frontends, err := n.frontends.frontends(workers.Infos(), newStepPolicy(n.cfg), d)
	if err != nil {
		return err
	}
	cacheKeys, err := bboltcachestorage.NewStore(filepath.Join(dir, keysFile))
	if err != nil {
		return fmt.Errorf("open step cache: %w", err)
	}
	e.opened = append(e.opened, cacheKeys)
	keys := solver.NewCacheManager(ctx, "local", cacheKeys, worker.NewCacheResultStorage(workers))
	history, err := boltutil.SafeOpen(filepath.Join(dir, historyFile), 0o600, &bolt.Options{
		FreelistType: bolt.FreelistMapType, NoFreelistSync: true,
	})
	if err != nil {
		return fmt.Errorf("open build history: %w", err)
	}
	e.opened = append(e.opened, history)
	e.databases = []snapshot.Database{refs.DB(), history}
	if err := e.deferred.Add(e.databases...); err != nil {
		return err
	}
	e.controller, err = control.NewController(control.Opt{
		SessionManager:   sessions,
		WorkerController: workers,
		Frontends:        frontends,
		CacheManager:     keys,
		ResolveCacheExporterFuncs: map[string]remotecache.ResolveCacheExporterFunc{
			"registry": fetches.cacheExporter(sessions, hosts),
			"local":    localremotecache.ResolveCacheExporterFunc(sessions),
			"inline":   inlineremotecache.ResolveCacheExporterFunc(),
		},
		ResolveCacheImporterFuncs: map[string]remotecache.ResolveCacheImporterFunc{
			"registry": fetches.cacheImporter(sessions, w.ContentStore(), hosts),
			"local":    localremotecache.ResolveCacheImporterFunc(sessions),
		},
		// No entitlement exists: a step that asks for one is refused.
		Entitlements:   nil,
		HistoryDB:      history,
		HistoryConfig:  &config.HistoryConfig{MaxEntries: ptr(historyEntries)},
		CacheStore:     cacheKeys,
		LeaseManager:   w.LeaseManager(),
		ContentStore:   w.ContentStore(),
		GarbageCollect: w.GarbageCollect,
		GracefulStop:   ctx.Done(),
	})
	if err != nil {
		return fmt.Errorf("assemble engine: %w", err)
	}
	e.keeper = newKeeper(dir, gcPolicy(n.cfg.Root, n.cfg.Space), n.cfg.CollectInterval, steps, keys, n.deferred, func() { n.collector.start(n) })
	return nil
}

func (n *Node) newWorker(ctx context.Context, dir string, d Domain, images *imageStore, hosts docker.RegistryHosts, refs *metadata.Store) (*base.Worker, error) {
	id, err := base.ID(dir)
	if err != nil {
		return nil, fmt.Errorf("read worker ID: %w", err)
	}
	store, content := n.store, images.content
	owned := domainLeases{Manager: ctdmetadata.NewLeaseManager(store.DB), domain: d.key()}
	w, err := base.NewWorker(ctx, base.WorkerOpt{
		ID:   id,
		Root: dir,
		Labels: map[string]string{
			label.Executor:       "kiln",
			label.Snapshotter:    snapshot.Snapshotter,
			"build.kiln.sandbox": string(d.Sandbox),
		},
		Platforms: []ocispecs.Platform{platforms.Normalize(platforms.DefaultSpec())},
		// With rules BuildKit would collect too; see keeper.
		GCPolicy:        nil,
		BuildkitVersion: client.BuildkitVersion{Package: version.Package, Version: version.Version, Revision: version.Revision},
		Executor:        newStepExecutor(n.runtimes, d),
		Snapshotter:     volatileSnapshotter{containerdsnapshot.NewSnapshotter(snapshot.Snapshotter, n.snapshotsOf(d), snapshot.Namespace, nil)},
		ContentStore:    content,
		ImageStore:      images,
		Applier:         layerApplier{apply.NewFileSystemApplier(content)},
		Differ:          walking.NewWalkingDiff(content),
		RegistryHosts:   hosts,
		LeaseManager:    leaseutil.WithNamespace(owned, snapshot.Namespace),
		GarbageCollect:  collectGarbage(store.DB),
		MetadataStore:   refs,
		MountPoolRoot:   filepath.Join(dir, "mounts"),
	})
	if err != nil {
		return nil, fmt.Errorf("assemble worker: %w", err)
	}
	if err := owned.deleteOrphans(namespaces.WithNamespace(ctx, snapshot.Namespace), refs); err != nil {
		return nil, err
	}
	return w, nil
}

// collectGarbage returns what removes the content and snapshots that nothing refers
// to. It goes on when its context is cancelled: containerd's would leave a goroutine
// behind for ever. It takes a fraction of a second.
func collectGarbage(db *ctdmetadata.DB) func(context.Context) (gc.Stats, error) {
	return func(ctx context.Context) (gc.Stats, error) {
		return db.GarbageCollect(context.WithoutCancel(ctx))
	}
}

// gcPolicy bounds what a domain keeps: by space where that is given, else by the
// size of the disk, with the shares that BuildKit's users know.
func gcPolicy(root string, space Space) []client.PruneInfo {
	stat, err := disk.GetDiskStat(root)
	if err != nil {
		stat = disk.DiskStat{}
	}
	var out []client.PruneInfo
	bounds := config.GCConfig{
		GCReservedSpace: config.DiskSpace{Bytes: space.Reserved},
		GCMaxUsedSpace:  config.DiskSpace{Bytes: space.MaxUsed},
		GCMinFreeSpace:  config.DiskSpace{Bytes: space.MinFree},
	}
	for _, rule := range config.DefaultGCPolicy(bounds, stat) {
		out = append(out, client.PruneInfo{
			Filter:        rule.Filters,
			All:           rule.All,
			KeepDuration:  rule.KeepDuration.Duration,
			ReservedSpace: rule.ReservedSpace.AsBytes(stat),
			MaxUsedSpace:  rule.MaxUsedSpace.AsBytes(stat),
			MinFreeSpace:  rule.MinFreeSpace.AsBytes(stat),
		})
	}
	return out
}

func ptr[T any](v T) *T { return &v }
