package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// DefaultDir is the state directory of a cluster that is not told another.
const DefaultDir = "/var/lib/kiln-cluster"

// ErrRunning is returned by Up for a state directory whose cluster runs.
var ErrRunning = errors.New("cluster runs already")

// Config says what cluster to start.
type Config struct {
	// Dir is the state directory; empty for DefaultDir. Its parent must exist.
	// Clusters with different state directories can run side by side.
	Dir string
	// Bin is the directory with the programs that `make cluster-tools` builds;
	// empty for bin at the top of the source tree that the working directory is in.
	Bin string
	// Nodes is the number of worker nodes, at most 8; 0 for two.
	Nodes int
	// RequestTimeout is how long the API server lets a request be that is no watch; 0
	// for its own default, a minute.
	RequestTimeout time.Duration
	// Log, if set, gets a line for each step of the start.
	Log io.Writer
}

func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" {
		c.Dir = DefaultDir
	}
	if c.Nodes == 0 {
		c.Nodes = 2
	}
	if c.Nodes < 1 || c.Nodes > maxNodes {
		return c, fmt.Errorf("start cluster: %d nodes: use 1 to %d", c.Nodes, maxNodes)
	}
	if c.Log == nil {
		c.Log = io.Discard
	}
	var err error
	if c.Dir, err = resolve(c.Dir); err != nil {
		return c, err
	}
	if c.Bin == "" {
		if c.Bin, err = findBin(); err != nil {
			return c, err
		}
	}
	c.Bin, err = resolve(c.Bin)
	return c, err
}

// Cluster is a running cluster. Its methods may be called from several
// goroutines, and by several processes that opened the same state directory.
type Cluster struct {
	dir, bin string
	machines []*Machine // the control plane, then the nodes
	registry string
	group    cgroup

	// children are the processes that this process started and has to reap.
	children sync.WaitGroup
}

// Open returns the cluster that runs in a state directory (empty for
// DefaultDir). It fails if there is none, or if it is not whole.
func Open(dir string) (*Cluster, error) {
	if dir == "" {
		dir = DefaultDir
	}
	dir, err := resolve(dir)
	if err != nil {
		return nil, err
	}
	r, err := readRecord(dir)
	if err != nil {
		return nil, fmt.Errorf("open cluster in %s: %w", dir, err)
	}
	if !r.Ready {
		return nil, fmt.Errorf("open cluster in %s: its start did not end; take it down first", dir)
	}
	c, err := newCluster(dir, r)
	if err != nil {
		return nil, err
	}
	for _, m := range r.Machines {
		if !m.Holder.alive() {
			return nil, fmt.Errorf("open cluster in %s: %s does not run; take the cluster down first", dir, m.Name)
		}
	}
	return c, nil
}

func newCluster(dir string, r *record) (*Cluster, error) {
	group, err := findCgroup(dir)
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, bin: r.Bin, registry: r.Registry, group: group}
	for _, m := range r.Machines {
		c.machines = append(c.machines, &Machine{cluster: c, name: m.Name, address: m.Address, holder: m.Holder})
	}
	return c, nil
}

// Dir returns the state directory.
func (c *Cluster) Dir() string { return c.dir }

// Kubeconfig returns the path of a kubeconfig file of an administrator, which
// works from the caller's network namespace.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "kubeconfig") }

// RESTConfig returns the same access as Kubeconfig, for client-go, and past any
// proxy that the environment names.
func (c *Cluster) RESTConfig() (*rest.Config, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig of cluster: %w", err)
	}
	cfg.Proxy = func(*http.Request) (*url.URL, error) { return nil, nil }
	return cfg, nil
}

// Registry returns the host:port of the cluster's registry. It is the same for
// the caller, the machines and Pods. It speaks plain HTTP without passwords, and
// the nodes' containerd is set up for it.
func (c *Cluster) Registry() string { return c.registry }

// SecureRegistry returns the host:port by which everybody reaches the same images
// over TLS, for programs that refuse plain HTTP. CAFile has the authority of its
// certificate, which the nodes' containerd trusts.
func (c *Cluster) SecureRegistry() string {
	return fmt.Sprintf("%s:%d", c.Control().address, secureRegistryPort)
}

// CAFile returns the path of the certificate of the authority that signs every
// server of the cluster. Pods find the same in the ConfigMap kube-root-ca.crt of
// their namespace.
func (c *Cluster) CAFile() string { return filepath.Join(c.dir, "pki", "ca.crt") }

// Image returns the full name of one of the images that the cluster brings into
// its registry: "pause" or "busybox".
func (c *Cluster) Image(name string) string { return c.registry + "/kiln/" + name + ":1" }

// Kubectl returns a command of kubectl as the administrator, which runs in the
// caller's namespaces.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(c.bin, "kubectl"), append([]string{"--kubeconfig=" + c.Kubeconfig()}, args...)...)
}

// Control returns the machine of the control plane: etcd, the API server, the
// controller manager, the scheduler and the registry.
func (c *Cluster) Control() *Machine { return c.machines[0] }

// Nodes returns the worker nodes.
func (c *Cluster) Nodes() []*Machine { return c.machines[1:] }

// Machine returns the control plane ("control") or a node by its name.
func (c *Cluster) Machine(name string) (*Machine, error) {
	for _, m := range c.machines {
		if m.name == name {
			return m, nil
		}
	}
	return nil, fmt.Errorf("find machine %q: the cluster has none of that name", name)
}

// Down removes the cluster; see the function Down.
func (c *Cluster) Down(ctx context.Context) error {
	err := Down(ctx, c.dir)
	if err == nil {
		c.children.Wait()
	}
	return err
}

// Down ends every process of the cluster with this state directory (empty for
// DefaultDir) and removes its cgroups, network devices and state. It is no error
// if there is no such cluster.
func Down(ctx context.Context, dir string) error {
	if dir == "" {
		dir = DefaultDir
	}
	dir, err := resolve(dir)
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return destroy(ctx, dir) // what a removed directory's cluster left
	case err != nil:
		return err
	}
	defer unlock()
	return destroy(ctx, dir)
}

func destroy(ctx context.Context, dir string) error {
	if err := checkOwned(dir); err != nil {
		return fmt.Errorf("take cluster down: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	group, err := findCgroup(dir)
	if err != nil {
		return err
	}
	if err := group.kill(ctx); err != nil {
		return err
	}
	if err := group.remove(ctx); err != nil {
		return err
	}
	if err := removeLink(ctx, dir); err != nil {
		return err
	}
	return removeState(dir)
}

// resolve makes a path absolute and free of symbolic links, also if its last
// part does not exist.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("resolve %s: %w", path, err)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", fmt.Errorf("resolve %s: %w", path, err)
	}
	path = filepath.Join(parent, filepath.Base(path))
	switch real, err := filepath.EvalSymlinks(path); {
	case err == nil:
		return real, nil
	case errors.Is(err, os.ErrNotExist):
		return path, nil
	default:
		return "", fmt.Errorf("resolve %s: %w", path, err)
	}
}

// findBin looks for bin beside the go.mod that governs the working directory.
func findBin() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find programs of cluster: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, "bin"), nil
		}
		if dir == "/" {
			return "", errors.New("find programs of cluster: not in the source tree; say where they are")
		}
	}
}
