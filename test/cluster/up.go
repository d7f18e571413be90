package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// programs are what has to be in Config.Bin.
var programs = []string{
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "coredns",
	"containerd", "containerd-shim-runc-v2", "runc", "ptp", "host-local", "portmap",
}

// debianPrograms come from the machine's packages.
var debianPrograms = []string{"docker-registry", "nft", "nsenter", busyboxPath}

// startTimeout bounds Up.
const startTimeout = 3 * time.Minute

// Up starts a cluster and returns when all its nodes are ready. It has to be root.
// If it fails it takes down what it started. If the state directory's cluster runs
// already the error is ErrRunning, and Open gives that cluster.
func Up(ctx context.Context, cfg Config) (*Cluster, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := check(cfg); err != nil {
		return nil, err
	}
	if err := begin(ctx, cfg); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("it took longer than %s", startTimeout))
	defer cancel()
	c, err := up(ctx, cfg)
	if err == nil {
		return c, nil
	}
	if ctx.Err() != nil && !errors.Is(err, context.Cause(ctx)) {
		err = errors.Join(context.Cause(ctx), err) // err is what the end of ctx led to
	}
	err = fmt.Errorf("start cluster: %w", err)
	clean, cancelClean := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancelClean()
	if c == nil {
		return nil, errors.Join(err, Down(clean, cfg.Dir))
	}
	return nil, errors.Join(err, c.Down(clean))
}

// check finds out what is missing before anything is made.
func check(cfg Config) error {
	if os.Geteuid() != 0 {
		return errors.New("start cluster: it needs to be root")
	}
	if err := checkHidden(cfg.Bin); err != nil {
		return err
	}
	var missing []string
	for _, p := range programs {
		if _, err := os.Stat(filepath.Join(cfg.Bin, p)); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("start cluster: %s has no %s; run `make cluster-tools`", cfg.Bin, strings.Join(missing, ", "))
	}
	for _, p := range debianPrograms {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("start cluster: no %s on this machine; run `make deps`", p)
		}
	}
	return nil
}

// begin writes the first record, which says that a start is under way.
func begin(ctx context.Context, cfg Config) error {
	if err := claim(cfg.Dir); err != nil {
		return fmt.Errorf("start cluster: %w", err)
	}
	unlock, err := lock(ctx, cfg.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := readRecord(cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		if _, err := Open(cfg.Dir); err != nil {
			return err
		}
		return ErrRunning
	}
	r := &record{Bin: cfg.Bin, Machines: []*machineRecord{{Name: controlName}}}
	for i := range cfg.Nodes {
		r.Machines = append(r.Machines, &machineRecord{Name: fmt.Sprintf("node%d", i+1)})
	}
	return r.write(cfg.Dir)
}

// up does the work of Up. With an error it may return a cluster, to be taken down.
func up(ctx context.Context, cfg Config) (*Cluster, error) {
	log := func(format string, args ...any) { fmt.Fprintf(cfg.Log, format+"\n", args...) }
	log("starting %d nodes in %s", cfg.Nodes, cfg.Dir)
	r, err := readRecord(cfg.Dir)
	if err != nil {
		return nil, err
	}
	c, err := newCluster(cfg.Dir, r)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"logs", "tmp"} {
		if err := os.MkdirAll(filepath.Join(cfg.Dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := c.group.create(c.nodeNames()); err != nil {
		return c, err
	}
	a, err := c.startMachines(ctx)
	if err != nil {
		return c, err
	}
	if err := c.wire(a); err != nil {
		return c, err
	}
	ca, err := c.writeControlFiles(a)
	if err != nil {
		return c, err
	}
	for i := range c.Nodes() {
		if err := c.writeNodeFiles(ca, a, i); err != nil {
			return c, err
		}
	}
	log("starting the control plane at %s", a.apiURL())
	if err := c.startStore(ctx); err != nil {
		return c, err
	}
	if err := c.startAPIServer(ctx, cfg, a); err != nil {
		return c, err
	}
	for _, n := range c.Nodes() {
		if err := n.startRuntime(ctx); err != nil {
			return c, err
		}
	}
	// What needs no API server is done while that starts.
	var g errgroup.Group
	g.Go(func() error { return c.bringImages(ctx) })
	g.Go(func() error { return c.bringAgents(ctx) })
	if err := g.Wait(); err != nil {
		return c, err
	}
	log("waiting for the nodes")
	if err := c.WaitReady(ctx); err != nil {
		return c, err
	}
	return c, c.update(ctx, func(r *record) error {
		r.Ready = true
		return nil
	})
}

// startMachines starts the machines, empty, chooses the cluster's networks, and
// records both.
func (c *Cluster) startMachines(ctx context.Context) (addresses, error) {
	for _, m := range c.machines {
		var err error
		if m.holder, err = c.hold(ctx, m.name); err != nil {
			return addresses{}, err
		}
	}
	a, err := reserve(ctx, c.dir, c.Control().PID())
	if err != nil {
		return a, err
	}
	c.registry = fmt.Sprintf("%s:%d", a.control(), registryPort)
	c.Control().address = a.control()
	for i, n := range c.Nodes() {
		n.address = a.node(i)
	}
	return a, c.update(ctx, func(r *record) error {
		r.Registry = c.registry
		for _, m := range c.machines {
			mr := r.machine(m.name)
			mr.Holder, mr.Address = m.holder, m.address
		}
		return nil
	})
}

func (c *Cluster) bringImages(ctx context.Context) error {
	if err := c.pushImages(ctx); err != nil {
		return err
	}
	for _, n := range c.Nodes() {
		if err := n.pullImages(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) bringAgents(ctx context.Context) error {
	if err := c.waitAPI(ctx); err != nil {
		return err
	}
	if err := c.startControllers(ctx); err != nil {
		return err
	}
	for _, n := range c.Nodes() {
		if err := n.startAgents(ctx); err != nil {
			return err
		}
	}
	return nil
}
