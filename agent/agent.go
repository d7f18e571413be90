package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/agent/failure"
	"github.com/kiln-build/kiln/agent/queue"
	"github.com/kiln-build/kiln/agent/record"
	"github.com/kiln-build/kiln/agent/upload"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Config says how an agent works. Engines and Policy must be there; the zero value
// of everything else has a default.
type Config struct {
	// Root is the state directory, whose lock the caller holds (snapshot.Lock). The
	// agent keeps builds and uploads below it.
	Root string
	// Node is the name of the node, and Version that of the program.
	Node, Version string
	// BuildKitVersion is that of the engine.
	BuildKitVersion string
	// Platforms are those that steps run on, the node's own first; none: that of
	// this program.
	Platforms []string
	// Sandboxes tells which classes of sandbox work, the strongest first. A build
	// for one that does not is refused. It is called for each request and must be
	// quick; nil: no class works.
	Sandboxes func() []*agentv1.SandboxInfo
	// NodeRuntime describes the node's container runtime; nil: there is none.
	NodeRuntime func(ctx context.Context) *agentv1.NodeRuntime
	// Engines runs builds.
	Engines Engines
	// Policy decides what a tenant may do.
	Policy Policy
	// Images receives images for NodeOutput; nil: it is refused.
	Images ImageReceiver
	// LocalBytes tells how many bytes of images, given by their names, need not be
	// fetched because the node has them; nil: unknown. It must be quick and use no
	// network. Nobody is told but callers who act for every tenant: the images of a node
	// are those of all who use it.
	LocalBytes func(ctx context.Context, images []string) int64
	// Queue, Records and Uploads bound what the agent does and keeps.
	Queue   queue.Limits
	Records record.Limits
	Uploads upload.Limits
	// Steps tells what steps of Engines used; nil: nobody does.
	Steps *Steps
	// Metrics counts builds; nil: nobody does. See NewMetrics.
	Metrics *Metrics
	// Tracer gives spans; nil: there are none.
	Tracer trace.TracerProvider
	// Logger gets what concerns the node's administrator; nil: slog.Default().
	Logger *slog.Logger
	// Now tells the time; nil: time.Now.
	Now func() time.Time
}

func (c Config) withDefaults() (Config, error) {
	if c.Engines == nil || c.Policy == nil || c.Root == "" {
		return c, errors.New("start agent: its root, engines and policy must be given")
	}
	if len(c.Platforms) == 0 {
		c.Platforms = []string{"linux/" + runtime.GOARCH}
	}
	if c.Sandboxes == nil {
		c.Sandboxes = func() []*agentv1.SandboxInfo { return nil }
	}
	if c.Tracer == nil {
		c.Tracer = noop.NewTracerProvider()
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c, nil
}

// Agent is the build service of a node. It is closed once, by Close.
type Agent struct {
	agentv1.UnimplementedBuildServiceServer

	cfg     Config
	started time.Time
	records *record.Store
	uploads *upload.Store
	queue   *queue.Queue
	runner  runner

	base context.Context // of all builds
	stop context.CancelCauseFunc

	mu       sync.Mutex
	jobs     map[record.Key]*job // guarded by mu; builds that have not ended
	draining bool                // guarded by mu
	working  sync.WaitGroup      // builds, and what the agent does besides; grows under mu and not when draining
	closing  chan struct{}       // closed by the first Drain
	ended    chan struct{}       // closed by Close; ends the janitor
	janitor  sync.WaitGroup
}

// sweepInterval is how often what is old is removed.
const sweepInterval = time.Minute

// New opens the state in cfg.Root and returns an agent that serves. Builds that an
// earlier process had not ended have their results when it returns.
func New(cfg Config) (_ *Agent, err error) {
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, started: cfg.Now(), jobs: map[record.Key]*job{}, closing: make(chan struct{}), ended: make(chan struct{})}
	a.base, a.stop = context.WithCancelCause(context.Background())
	a.records, err = record.Open(filepath.Join(cfg.Root, "builds"), record.Options{Limits: cfg.Records, Now: cfg.Now, Logger: cfg.Logger})
	if err != nil {
		return nil, fmt.Errorf("open records: %w", err)
	}
	a.uploads, err = upload.Open(filepath.Join(cfg.Root, "uploads"), cfg.Uploads, a.freeDisk, cfg.Now)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open uploads: %w", err), a.records.Close())
	}
	a.queue = queue.New(cfg.Queue, a.freeDisk)
	a.runner = a.newRunner()
	a.janitor.Go(a.sweep)
	return a, nil
}

// newRunner puts together what a build goes through, from the outside in.
func (a *Agent) newRunner() runner {
	var r runner = &solver{cfg: a.cfg, patience: patience}
	r = &limited{next: r}
	r = &queued{next: r, log: a.cfg.Logger, closing: a.closing}
	r = &guarded{next: r, log: a.cfg.Logger}
	r = &traced{next: r, tracer: a.cfg.Tracer.Tracer("github.com/kiln-build/kiln/agent")}
	if a.cfg.Metrics != nil {
		a.cfg.Metrics.watch(a.queue)
		r = &measured{next: r, metrics: a.cfg.Metrics, now: a.cfg.Now}
	}
	return r
}

// freeDisk returns the free bytes of the state directory's file system.
func (a *Agent) freeDisk() (int64, error) {
	_, free, err := a.disk()
	return free, err
}

func (a *Agent) disk() (size, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(a.cfg.Root, &st); err != nil {
		return 0, 0, fmt.Errorf("look at free disk: %w", err)
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}

// sweep removes what is old until the agent is closed.
func (a *Agent) sweep() {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-a.ended:
			return
		}
		a.uploads.Sweep()
		if err := a.records.Sweep(); err != nil {
			a.cfg.Logger.Error("cannot remove old builds", "error", err)
		}
	}
}

// Draining tells whether the agent accepts no builds any more.
func (a *Agent) Draining() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.draining
}

// Drain refuses new builds with UNAVAILABLE, ends those that wait as interrupted, so
// that they can start elsewhere, and lets those that run go on until ctx ends: then
// they end as interrupted too. All results are on disk when it returns. It returns when no build is left, nil when all have ended by themselves. Other calls
// are served until Close.
func (a *Agent) Drain(ctx context.Context) error {
	a.mu.Lock()
	if !a.draining {
		a.draining = true
		close(a.closing)
	}
	a.mu.Unlock()
	idle := make(chan struct{})
	go func() {
		a.working.Wait()
		close(idle)
	}()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
	}
	a.stop(&failure.Interrupted{})
	<-idle
	return context.Cause(ctx)
}

// Close ends all builds as interrupted, as Drain does that may not wait, and
// releases everything. Calls to the agent fail from then on.
func (a *Agent) Close() error {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	_ = a.Drain(now) // says that builds were interrupted, which their results say too
	a.stop(&failure.Interrupted{})
	close(a.ended)
	a.janitor.Wait()
	a.queue.Close()
	return errors.Join(a.uploads.Close(), a.records.Close())
}
