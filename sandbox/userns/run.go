package userns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/stepfs"
)

// cleanup runs what was deferred, last first, whatever fails.
type cleanup []func() error

func (c *cleanup) add(f func() error) { *c = append(*c, f) }

func (c *cleanup) run() error {
	var errs []error
	for i := len(*c) - 1; i >= 0; i-- {
		errs = append(errs, (*c)[i]())
	}
	*c = nil
	return errors.Join(errs...)
}

// Run implements sandbox.Runtime.
func (r *Runtime) Run(ctx context.Context, step *sandbox.Step, started func()) (res *sandbox.Result, err error) {
	if err := step.Validate(); err != nil {
		return nil, fmt.Errorf("step: %w", err)
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("run step %s: %w", step.ID, context.Cause(ctx))
	}
	var owned cleanup
	defer func() {
		if cerr := owned.run(); cerr != nil {
			res, err = nil, errors.Join(err, fmt.Errorf("clean up step %s: %w", step.ID, cerr))
		}
	}()
	run := &running{step: step}
	r.mu.Lock()
	if r.running[step.ID] != nil {
		r.mu.Unlock()
		return nil, fmt.Errorf("step %s is running already", step.ID)
	}
	r.running[step.ID] = run
	r.mu.Unlock()
	owned.add(func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.running, step.ID)
		return nil
	})

	dir := filepath.Join(stepsDir(r.cfg), step.ID)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make step directory: %w", err)
	}
	owned.add(func() error { return removeStepDir(dir) })
	if err := r.prepare(ctx, &owned, dir, run); err != nil {
		return nil, fmt.Errorf("prepare step %s: %w", step.ID, err)
	}
	ready := func() {
		r.mu.Lock()
		run.ready = true
		r.mu.Unlock()
		if started != nil {
			started()
		}
	}
	res, err = r.supervise(ctx, dir, "init", step.Process, func() bool { return r.runc.executes(step.ID) }, ready, "run", "--bundle", dir, step.ID)
	if err != nil {
		// runc removes the container when it ends by itself only.
		if derr := r.runc.delete(context.WithoutCancel(ctx), step.ID); derr != nil {
			err = errors.Join(err, derr)
		}
		r.runc.removeCgroup(path.Join(r.cgroupParent(), step.ID))
		return nil, fmt.Errorf("run step %s: %w", step.ID, err)
	}
	return res, nil
}

// prepare makes everything that the step needs below dir. What it makes is added
// to owned in the order of making.
func (r *Runtime) prepare(ctx context.Context, owned *cleanup, dir string, run *running) error {
	step := run.step
	owner := step.Owner
	if owner == "" {
		owner = "\x00" + step.ID
	}
	ids, err := r.ranges.acquire(owner)
	if err != nil {
		return err
	}
	owned.add(func() error { return r.ranges.release(ids) })

	netns, nameservers, err := r.network(ctx, owned, step)
	if err != nil {
		return err
	}

	destinations := make([]string, len(step.Mounts))
	for i, m := range step.Mounts {
		destinations[i] = m.Destination
	}
	if !step.ReadonlyRoot {
		stubs := sandbox.RecordStubs(step.Root, destinations)
		owned.add(stubs.Remove)
	}
	run.rootfs = filepath.Join(dir, "rootfs")
	unmount, err := stepfs.Make(step.Root, run.rootfs, stepfs.Options{Suid: true, Volatile: true, IDMap: ids.idMap()})
	if err != nil {
		return fmt.Errorf("root: %w", err)
	}
	owned.add(unmount)

	user, err := sandbox.ResolveUser(run.rootfs, step.Process.User)
	if err != nil {
		return err
	}
	run.noNewPrivs = !sandbox.NeedsSetuid(run.rootfs)
	spec := sandbox.BaseSpec(step, step.Process, user, netns, run.noNewPrivs)
	clampDefaults(spec.Process, step.Process)
	if spec.Linux.Seccomp != nil && !runsForeign(run.rootfs) {
		spec.Linux.Seccomp.Architectures = nil
	}
	spec.Root.Path = run.rootfs
	spec.Linux.UIDMappings, spec.Linux.GIDMappings = ids.mapping(), ids.mapping()
	// The cgroup namespace hides where in the node's cgroups the step is.
	spec.Linux.Namespaces = append(spec.Linux.Namespaces,
		specs.LinuxNamespace{Type: specs.UserNamespace}, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	spec.Linux.CgroupsPath = path.Join(r.cgroupParent(), step.ID)
	if netns != "" {
		if err := ownSysfs(owned, spec, dir, netns); err != nil {
			return err
		}
	}
	if err := addEtcFiles(spec, dir, step, nameservers, ids); err != nil {
		return err
	}
	for i, m := range step.Mounts {
		source := filepath.Join(dir, fmt.Sprint("mount", i))
		unmount, err := stepfs.Make(m.Tree, source, stepfs.Options{Readonly: m.Readonly, Subpath: m.Subpath, Volatile: true, IDMap: ids.idMap()})
		if err != nil {
			return fmt.Errorf("mount for %s: %w", m.Destination, err)
		}
		owned.add(unmount)
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: m.Destination, Type: "bind", Source: source, Options: []string{"bind"}})
	}
	return writeJSON(filepath.Join(dir, "config.json"), spec)
}

// network returns the step's network namespace; an empty path asks runc for a new
// one without any device but loopback.
func (r *Runtime) network(ctx context.Context, owned *cleanup, step *sandbox.Step) (string, []netip.Addr, error) {
	if r.cfg.Networks == nil {
		if step.Network != sandbox.NetworkNone {
			return "", nil, fmt.Errorf("network %s is not set up on this node: use network %s", step.Network, sandbox.NetworkNone)
		}
		return "", nil, nil
	}
	network, err := r.cfg.Networks.Acquire(ctx, step.Network)
	if err != nil {
		return "", nil, fmt.Errorf("get network %s: %w", step.Network, err)
	}
	owned.add(network.Release)
	return network.Path(), network.Nameservers(), nil
}

// addEtcFiles mounts the step's files below /etc.
func addEtcFiles(spec *specs.Spec, dir string, step *sandbox.Step, nameservers []netip.Addr, ids *idRange) error {
	files, err := sandbox.WriteEtcFiles(dir, step, nameservers)
	if err != nil {
		return err
	}
	for destination, file := range files {
		if err := os.Chown(file, int(ids.first), int(ids.first)); err != nil {
			return fmt.Errorf("own %s: %w", file, err)
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: destination, Type: "bind", Source: file, Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}})
	}
	return nil
}

// Exec implements sandbox.Runtime.
func (r *Runtime) Exec(ctx context.Context, stepID string, process sandbox.Process) (*sandbox.Result, error) {
	if err := process.Validate(); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	r.mu.Lock()
	run := r.running[stepID]
	ready := run != nil && run.ready
	r.mu.Unlock()
	if !ready {
		return nil, fmt.Errorf("exec in step %s: %w", stepID, sandbox.ErrNotRunning)
	}
	user, err := sandbox.ResolveUser(run.rootfs, process.User)
	if err != nil {
		return nil, fmt.Errorf("exec in step %s: %w", stepID, err)
	}
	dir, err := os.MkdirTemp(stepsDir(r.cfg), ".exec-")
	if err != nil {
		return nil, fmt.Errorf("make directory for exec: %w", err)
	}
	defer removeStepDir(dir)
	file := filepath.Join(dir, "process.json")
	spec := sandbox.ProcessSpec(process, user, run.noNewPrivs)
	clampDefaults(spec, process)
	if err := writeJSON(file, spec); err != nil {
		return nil, err
	}
	res, err := r.supervise(ctx, dir, "exec", process, nil, nil, "exec", "--process", file, stepID)
	if err != nil {
		if strings.Contains(err.Error(), "container not running") || strings.Contains(err.Error(), "does not exist") {
			err = sandbox.ErrNotRunning
		}
		return nil, fmt.Errorf("exec in step %s: %w", stepID, err)
	}
	return res, nil
}

// clampDefaults lowers limits that nobody asked for to what this process may give.
// Without CAP_SYS_RESOURCE runc could not raise them above its own.
func clampDefaults(spec *specs.Process, p sandbox.Process) {
	if len(p.Rlimits) > 0 {
		return
	}
	for i, l := range spec.Rlimits {
		var own unix.Rlimit
		if l.Type == "RLIMIT_NOFILE" && unix.Getrlimit(unix.RLIMIT_NOFILE, &own) == nil {
			spec.Rlimits[i].Hard = min(l.Hard, own.Max)
			spec.Rlimits[i].Soft = min(l.Soft, own.Max)
		}
	}
}

func writeJSON(file string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(file), err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		return fmt.Errorf("write runtime spec: %w", err)
	}
	return nil
}
