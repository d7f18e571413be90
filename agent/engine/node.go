package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/util/resolver"
	fscopy "github.com/tonistiigi/fsutil/copy"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/snapshot"
	"github.com/kiln-build/kiln/snapshot/nodestore"
)

// NodeConfig says what all engines of a node have in common.
type NodeConfig struct {
	// Root is the state directory. The caller holds its lock (snapshot.Lock).
	Root string
	// RunscPath is the OCI runtime of gVisor sandboxes. It has to exist if there are
	// to be any.
	RunscPath string
	// Frontends lists the external front ends that a Dockerfile's syntax line or a
	// client may name, each as an image reference with a digest. They run in a
	// sandbox as every step does. The Dockerfile front end is built in.
	Frontends []string
	// Lender lends blobs of images that the node's container runtime has, in place
	// of fetching them; nil: none does.
	Lender nodestore.Node
	// Space bounds what the caches of all domains occupy.
	Space Space
	// CollectInterval is the least time between two collections of a cache; 0: a minute.
	CollectInterval time.Duration
	// Limits returns the most that a step of a domain may use, whatever it asks for;
	// nil, and zero fields: nothing is limited but processes, open files, logs and
	// /dev/shm, by the Default constants. It is asked before each step and must not block.
	Limits func(Domain) sandbox.Limits
	// OnStep, if set, is told of each step that has ended, before its builds are. It
	// is called from several goroutines and must not block.
	OnStep func(StepReport)
	// Rules returns what holds for the steps of a domain, whatever was checked before
	// they came here; nil: what holds for every step. It is asked before each step and
	// must not block.
	Rules func(Domain) StepRules
	// Stays says that this process stays when its builds are over, as an agent does: it has
	// the time to sync the files of layers too, and not the databases alone.
	Stays bool
	// OnLoss, if set, is told when the state was removed because the node had gone down
	// before all of it was on the disk.
	OnLoss func()
	// Fetch says where sources by HTTP and git may come from and which registries may
	// be reached, by address; nil: anything that this process can reach. A process
	// may have one open Node with it.
	Fetch *egress.Policy
}

// Space bounds disk space, each in bytes; 0 is no bound. The zero value means
// BuildKit's default shares of the file system.
type Space struct {
	// Reserved is what a domain's cache may always keep.
	Reserved int64
	// MaxUsed is what a domain's cache may occupy, and all together.
	MaxUsed int64
	// MinFree is what must stay free on the file system.
	MinFree int64
}

// Node is the part of a node that its engines share: the build store and the
// sandbox runtimes. Content-addressed blobs and layers are in it once; all else
// belongs to one domain. Its methods may be called concurrently.
type Node struct {
	cfg       NodeConfig
	frontends *frontendPolicy
	store     *snapshot.Store
	deferred  *snapshot.DeferredSync
	runtimes  *runtimes
	fetching  *fetching

	// mu guards what follows.
	mu      sync.Mutex
	engines map[Domain]*openEngine
	closed  bool

	collector collector
}

// OpenNode opens the state in cfg.Root. It sets TMPDIR of this process to a
// directory below it, so that nothing that a killed process had there outlives
// the next OpenNode, and its umask to 0: what is in a layer has the mode that the
// build says. With cfg.Fetch, git on the PATH and http.DefaultClient are this
// process's to fetch for builds until Close.
func OpenNode(ctx context.Context, cfg NodeConfig) (_ *Node, err error) {
	if cfg.Root, err = checkedRoot(cfg.Root); err != nil {
		return nil, err
	}
	zeroUmask()
	n := &Node{cfg: cfg, engines: map[Domain]*openEngine{}}
	if n.frontends, err = newFrontendPolicy(cfg.Frontends); err != nil {
		return nil, err
	}
	if err := freshTempDir(filepath.Join(cfg.Root, "tmp")); err != nil {
		return nil, err
	}
	if err := n.openStore(ctx); err != nil {
		return nil, err
	}
	if n.fetching, err = openFetching(filepath.Join(cfg.Root, "tmp", "git"), cfg.Fetch); err != nil {
		return nil, errors.Join(err, n.deferred.Close(), n.store.Close())
	}
	n.runtimes = newRuntimes(cfg)
	return n, nil
}

// openStore opens the store, or a new one when the node went down before the last was
// synced.
func (n *Node) openStore(ctx context.Context) (err error) {
	cfg := snapshot.DeferredSyncConfig{Root: n.cfg.Root, State: []string{"store", "domains", refsFile, keysFile, historyFile, collectedFile}, Files: n.cfg.Stays}
	var lost bool
	if n.deferred, lost, err = snapshot.OpenDeferredSync(cfg); err != nil {
		return err
	}
	if lost && n.cfg.OnLoss != nil {
		n.cfg.OnLoss()
	}
	if n.store, err = snapshot.Open(ctx, filepath.Join(n.cfg.Root, "store")); err != nil {
		return errors.Join(err, n.deferred.Close())
	}
	if err := n.deferred.Add(n.store.Databases()...); err != nil {
		return errors.Join(err, n.deferred.Close(), n.store.Close())
	}
	return nil
}

// fetchesOf returns what fetches for a domain, and the registries that it knows.
func (n *Node) fetchesOf(d Domain) (*domainFetching, docker.RegistryHosts) {
	f := n.fetching.of(n.rulesOf(d))
	// Loopback registries speak plain HTTP by default; see BuildKit's resolver.
	hosts := f.hosts(resolver.NewRegistryConfig(nil))
	if n.cfg.Lender != nil {
		hosts = nodestore.Lending(hosts, n.cfg.Lender, nil)
	}
	return f, hosts
}

// Warm starts preparing sandboxes of the given classes, so that the first steps find
// them, and returns at once. What goes wrong is left to the step that needs a sandbox
// to tell.
func (n *Node) Warm(classes ...sandbox.Class) { n.runtimes.warm(classes) }

// Close closes all engines and releases what they share. Nobody may use an engine
// any more.
func (n *Node) Close() error {
	n.collector.stop()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	var errs []error
	for _, open := range n.engines {
		if open.idle != nil {
			open.idle.Stop()
		}
		errs = append(errs, open.engine.Close())
	}
	n.engines = nil
	return errors.Join(append(errs, n.runtimes.close(), n.fetching.close(), n.deferred.Close(), n.store.Close())...)
}

// checkedRoot returns root as an absolute path, and refuses one that cannot be
// written in the kernel's overlay options.
func checkedRoot(root string) (string, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return "", fmt.Errorf("state directory %q: %w", root, err)
	}
	if strings.ContainsAny(abs, ":,\\\n") {
		return "", fmt.Errorf("state directory %q: a colon, comma, backslash or line break cannot be used in overlay mounts; choose another --root", abs)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return "", fmt.Errorf("make state directory: %w", err)
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return "", fmt.Errorf("state directory: %w", err)
	}
	return abs, nil
}

// zeroUmask is called once: BuildKit reads the variable without a lock.
var zeroUmask = sync.OnceFunc(func() {
	unix.Umask(0)
	fscopy.UmaskIsZero = true
})

func freshTempDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clear temporary directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make temporary directory: %w", err)
	}
	return os.Setenv("TMPDIR", dir)
}
