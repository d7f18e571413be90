package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/kiln-build/kiln/snapshot"
)

// NodeConfig says what all engines of a node have in common.
type NodeConfig struct {
	// Root is the state directory. The caller holds its lock (snapshot.Lock).
	Root string
	// RuncPath and RunscPath are the OCI runtimes of the classes of sandbox. Only
	// those of classes that are used have to exist.
	RuncPath, RunscPath string
	// Frontends lists the external front ends that a Dockerfile's syntax line or a
	// client may name, each as an image reference with a digest. They run in a
	// sandbox as every step does. The Dockerfile front end is built in.
	Frontends []string
}

// Node is the part of a node that its engines share: the build store and the
// sandbox runtimes. Content-addressed blobs and layers are in it once; all else
// belongs to one domain. Its methods may be called concurrently.
type Node struct {
	cfg       NodeConfig
	frontends *frontendPolicy
	store     *snapshot.Store
	runtimes  *runtimes

	// mu guards what follows.
	mu      sync.Mutex
	engines map[Domain]*openEngine
	closed  bool
}

// OpenNode opens the state in cfg.Root. It sets TMPDIR of this process to a
// directory below it, so that nothing that a killed process had there outlives
// the next OpenNode.
func OpenNode(ctx context.Context, cfg NodeConfig) (_ *Node, err error) {
	if cfg.Root, err = checkedRoot(cfg.Root); err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, engines: map[Domain]*openEngine{}}
	if n.frontends, err = newFrontendPolicy(cfg.Frontends); err != nil {
		return nil, err
	}
	if err := freshTempDir(filepath.Join(cfg.Root, "tmp")); err != nil {
		return nil, err
	}
	if n.store, err = snapshot.Open(ctx, filepath.Join(cfg.Root, "store")); err != nil {
		return nil, err
	}
	n.runtimes = newRuntimes(cfg)
	return n, nil
}

// Close closes all engines and releases what they share. Nobody may use an engine
// any more.
func (n *Node) Close() error {
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
	return errors.Join(append(errs, n.runtimes.close(), n.store.Close())...)
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

func freshTempDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clear temporary directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make temporary directory: %w", err)
	}
	return os.Setenv("TMPDIR", dir)
}
