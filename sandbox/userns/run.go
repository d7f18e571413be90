package userns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

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

// running is a step from its registration to the end of its first process.
type running struct {
	step *sandbox.Step
	// mounts are those of the step's trees, the root first.
	mounts []*stepfs.Detached
	stubs  *sandbox.Stubs

	// mu guards what follows. It is held for reading while another process of the
	// step is being started.
	mu    sync.RWMutex
	cell  *cell // nil before the step runs and after it
	facts *facts
}

// open makes a mount of a tree of the step.
func (r *running) open(c *cell, tree sandbox.Tree, opts stepfs.Options) (*stepfs.Detached, error) {
	opts.Volatile, opts.IDMap = true, c.idMap()
	m, err := stepfs.Open(tree, opts)
	if err == nil {
		r.mounts = append(r.mounts, m)
	}
	return m, err
}

// recordStubs notes which mount points will have to be made in the root, which is
// mounted at rootfs.
func (r *running) recordStubs(rootfs string) (err error) {
	if r.step.ReadonlyRoot {
		return nil
	}
	destinations := make([]string, len(r.step.Mounts))
	for i, m := range r.step.Mounts {
		destinations[i] = m.Destination
	}
	r.stubs, err = sandbox.RecordStubsIn(rootfs, r.step.Root, destinations)
	return err
}

// removeStubs removes the mount points that were made.
func (r *running) removeStubs() error {
	if r.stubs == nil {
		return nil
	}
	return r.stubs.Remove()
}

// close closes the descriptors of the mounts.
func (r *running) close() error {
	var errs []error
	for _, m := range r.mounts {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// settle is called when the mounts are gone.
func (r *running) settle() error {
	var errs []error
	for _, m := range r.mounts {
		errs = append(errs, m.Settle())
	}
	return errors.Join(errs...)
}

// Run implements sandbox.Runtime.
func (r *Runtime) Run(ctx context.Context, step *sandbox.Step, started func()) (res *sandbox.Result, err error) {
	if err := step.Validate(); err != nil {
		return nil, fmt.Errorf("step: %w", err)
	}
	for _, m := range step.Mounts {
		if d := path.Clean(m.Destination); d == "/proc" || strings.HasPrefix(d, "/proc/") {
			return nil, fmt.Errorf("step: mount at %s: nothing can be mounted in /proc", m.Destination)
		}
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("run step %s: %w", step.ID, context.Cause(ctx))
	}
	run := &running{step: step}
	if err := r.register(run); err != nil {
		return nil, err
	}
	defer r.unregister(run)
	var owned cleanup
	defer func() {
		if cerr := owned.run(); cerr != nil {
			res, err = nil, errors.Join(err, fmt.Errorf("clean up step %s: %w", step.ID, cerr))
		}
	}()
	dir := filepath.Join(stepsDir(r.cfg), step.ID)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make step directory: %w", err)
	}
	owned.add(func() error { return removeStepDir(dir) })
	owned.add(run.removeStubs)
	owned.add(run.settle)
	c, err := r.take(ctx, step)
	if err != nil {
		return nil, blame(ctx, "prepare", step.ID, err)
	}
	// What its network may reach is what it may at this moment.
	next, bequeaths := sandbox.SuccessorOf(step), false
	// The sandbox's mounts are gone when Run returns; its cgroup and network need
	// not be.
	owned.add(func() error {
		if bequeaths {
			r.pool.bequeath(c, next)
		} else {
			r.discardLater(c)
		}
		return nil
	})
	owned.add(func() error { c.end(); return nil })
	owned.add(run.close)
	if err := c.restrict(step.Egress); err != nil {
		return nil, fmt.Errorf("prepare step %s: %w", step.ID, err)
	}
	watched, w, err := r.watch(ctx, c, step)
	if err != nil {
		return nil, fmt.Errorf("prepare step %s: %w", step.ID, err)
	}
	owned.add(func() error { w.Stop(); return nil })
	if err := c.cgroup.Limit(step.Limits); err != nil {
		if res, ok := tooSmall(err); ok {
			return res, nil
		}
		return nil, fmt.Errorf("limit step %s: %w", step.ID, err)
	}
	streams, err := connect(step.Process, c.ids.first)
	if err != nil {
		return nil, fmt.Errorf("prepare step %s: %w", step.ID, err)
	}
	owned.add(streams.abort)
	stop := context.AfterFunc(ctx, c.conn.Abort)
	prog, err := r.prepare(c, run, dir, streams)
	if err == nil {
		err = prog.start(c.conn, c.proc.Pid, true)
	}
	stop()
	if err != nil {
		return nil, blame(ctx, "start", step.ID, err)
	}
	run.enterable(c)
	owned.add(func() error { run.enterable(nil); return nil })
	if started != nil {
		started()
	}
	if res, err = supervise(watched, c.child, step.Process, streams); err != nil {
		var ended bool
		if res, ended = sandbox.EndedBy(err); !ended || ctx.Err() != nil {
			return nil, fmt.Errorf("run step %s: %w", step.ID, err)
		}
	}
	if err := errors.Join(conclude(res, c, w), c.contacts(res)); err != nil {
		return nil, fmt.Errorf("step %s: %w", step.ID, err)
	}
	bequeaths = next != nil && mayBequeath(c, res)
	return res, nil
}

// enterable sets the sandbox in which Exec can start processes.
func (r *running) enterable(c *cell) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cell = c
}

// blame returns the error of a step that could not start, which is ctx's when that
// is why.
func blame(ctx context.Context, what, id string, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("%s step %s: %w", what, id, err)
}

func (r *Runtime) register(run *running) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running[run.step.ID] != nil {
		return fmt.Errorf("step %s is running already", run.step.ID)
	}
	r.running[run.step.ID] = run
	return nil
}

func (r *Runtime) unregister(run *running) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, run.step.ID)
}

// prepare puts everything that the step needs into the cell, and returns the program
// that remains to be executed. dir is for files of the step.
func (r *Runtime) prepare(c *cell, run *running, dir string, streams *streams) (*program, error) {
	step := run.step
	root, err := run.open(c, step.Root, stepfs.Options{Suid: true})
	if err != nil {
		return nil, fmt.Errorf("root: %w", err)
	}
	rootfs := pathOf(root.File)
	run.facts = r.facts.of(step.Root, rootfs)
	if err := run.recordStubs(rootfs); err != nil {
		return nil, err
	}
	e := entry{root: root, readonly: step.ReadonlyRoot, hostname: step.Hostname, shmSize: step.Limits.ShmBytes, cwd: step.Process.Cwd}
	if e.hostname == "" {
		e.hostname = sandbox.DefaultHostname
	}
	files, err := etcFiles(dir, c, step)
	for _, f := range files {
		defer f.mount.Close()
	}
	if err != nil {
		return nil, err
	}
	e.places = files
	for _, m := range step.Mounts {
		mount, err := run.open(c, m.Tree, stepfs.Options{Readonly: m.Readonly, Subpath: m.Subpath})
		if err != nil {
			return nil, fmt.Errorf("mount for %s: %w", m.Destination, err)
		}
		e.places = append(e.places, place{mount, m.Destination})
	}
	prog, err := r.newProgram(step.Process, step.Limits, rootfs, run.facts)
	if err != nil {
		return nil, err
	}
	return &prog, e.run(c.conn, &prog, streams)
}

// newProgram returns the program of a process in the root at rootfs.
func (r *Runtime) newProgram(process sandbox.Process, l sandbox.Limits, rootfs string, f *facts) (program, error) {
	user, err := f.user(rootfs, process.User)
	if err != nil {
		return program{}, err
	}
	filter, err := r.filters.of(f.foreign)
	if err != nil {
		return program{}, err
	}
	return newProgram(processOf(process, l, user.ids, !f.setuid), user.home, filter)
}

// etcFiles makes the step's own files below /etc in dir, and mounts of them.
func etcFiles(dir string, c *cell, step *sandbox.Step) (places []place, err error) {
	files, err := sandbox.WriteEtcFiles(dir, step, c.nameservers)
	if err != nil {
		return nil, err
	}
	for destination, file := range files {
		if err := os.Chown(file, int(c.ids.first), int(c.ids.first)); err != nil {
			return places, fmt.Errorf("own %s: %w", file, err)
		}
		m, err := stepfs.Open(sandbox.Tree{Dir: file}, stepfs.Options{Readonly: true, Noexec: true})
		if err != nil {
			return places, err
		}
		places = append(places, place{m, destination})
	}
	return places, nil
}

// Exec implements sandbox.Runtime.
func (r *Runtime) Exec(ctx context.Context, stepID string, process sandbox.Process) (*sandbox.Result, error) {
	if err := process.Validate(); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	r.mu.Lock()
	run := r.running[stepID]
	r.mu.Unlock()
	if run == nil {
		return nil, fmt.Errorf("exec in step %s: %w", stepID, sandbox.ErrNotRunning)
	}
	c, streams, err := r.join(ctx, run, process)
	if err != nil {
		return nil, fmt.Errorf("exec in step %s: %w", stepID, err)
	}
	defer streams.abort()
	res, err := supervise(ctx, c, process, streams)
	if err != nil {
		return nil, fmt.Errorf("exec in step %s: %w", stepID, err)
	}
	return res, nil
}

// join starts a process in a running step.
func (r *Runtime) join(ctx context.Context, run *running, process sandbox.Process) (_ *child, _ *streams, err error) {
	run.mu.RLock()
	defer run.mu.RUnlock()
	if run.cell == nil {
		return nil, nil, sandbox.ErrNotRunning
	}
	streams, err := connect(process, run.cell.ids.first)
	if err != nil {
		return nil, nil, err
	}
	c, err := r.enter(ctx, run, process, streams)
	if err != nil {
		streams.abort()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		} else if run.cell.ending() {
			err = sandbox.ErrNotRunning
		}
		return nil, nil, err
	}
	return c, streams, nil
}

func (r *Runtime) enter(ctx context.Context, run *running, process sandbox.Process, streams *streams) (*child, error) {
	rootfs := pathOf(run.mounts[0].File)
	// The step may have changed its users since it started.
	now := &facts{setuid: run.facts.setuid, foreign: run.facts.foreign, users: map[string]account{}}
	prog, err := r.newProgram(process, run.step.Limits, rootfs, now)
	if err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(run.cell.proc.Pid, 0)
	if err != nil {
		return nil, fmt.Errorf("find process of the step: %w", err)
	}
	target := os.NewFile(uintptr(pidfd), "pidfd")
	defer target.Close()
	doors, err := run.cell.cgroup.Doors()
	if err != nil {
		return nil, err
	}
	defer closeAll(doors)
	c, conn, err := r.zygote.make(birth{pid: target, cgroup: run.cell.cgroup.Unified()})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, conn.Abort)
	defer stop()
	err = prog.join(conn, target, doors, streams)
	if err == nil {
		err = prog.start(conn, c.proc.Pid, false)
	}
	if err != nil {
		c.kill()
		return nil, err
	}
	return c, nil
}

// pathOf returns a path of what a descriptor is for.
func pathOf(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
