package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	"github.com/moby/buildkit/identity"

	"github.com/kiln-build/kiln/sandbox"
)

// stepExecutor runs the processes that BuildKit's solver asks for in sandboxes of
// one domain.
type stepExecutor struct {
	runtimes *runtimes
	policy   *stepPolicy
	domain   Domain
	owner    string
}

var _ executor.Executor = (*stepExecutor)(nil)

func newStepExecutor(r *runtimes, d Domain) *stepExecutor {
	return &stepExecutor{runtimes: r, policy: newStepPolicy(r.cfg), domain: d, owner: identity.NewID()}
}

// Run implements executor.Executor.
func (e *stepExecutor) Run(ctx context.Context, id string, root executor.Mount, mounts []executor.Mount, process executor.ProcessInfo, started chan<- struct{}) (_ resourcestypes.Recorder, err error) {
	var once sync.Once
	start := func() {
		once.Do(func() {
			if started != nil {
				close(started)
			}
		})
	}
	defer start()
	if err := e.policy.checkProcess(e.domain, process.Meta); err != nil {
		return nil, err
	}
	rt, err := e.runtimes.get(ctx, e.domain.Sandbox)
	if err != nil {
		return nil, err
	}
	step, err := e.newStep(ctx, id, process)
	if err != nil {
		return nil, err
	}
	var releases []func() error
	defer func() {
		for _, r := range slices.Backward(releases) {
			err = errors.Join(err, r())
		}
	}()
	var release func() error
	if step.Root, step.ReadonlyRoot, release, err = treeOf(ctx, root); err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	releases = append(releases, release)
	step.ReadonlyRoot = step.ReadonlyRoot || process.Meta.ReadonlyRootFS
	for _, m := range mounts {
		tree, readonly, release, err := treeOf(ctx, m)
		if err != nil {
			return nil, fmt.Errorf("mount at %s: %w", m.Dest, err)
		}
		releases = append(releases, release)
		step.Mounts = append(step.Mounts, sandbox.Mount{
			Destination: absolute(process.Meta.Cwd, m.Dest),
			Tree:        tree, Subpath: m.Selector, Readonly: readonly,
			Socket: tree.Dir != "" && isSocket(tree.Dir),
		})
	}
	if err := e.policy.checkStep(ctx, e.domain, process.Meta, step); err != nil {
		return nil, err
	}
	began, logged := time.Now(), logStep(ctx, &step.Process, step.Limits)
	res, err := rt.Run(ctx, step, start)
	if err == nil {
		err = exitError(ctx, res, step.Limits, process.Meta.ValidExitCodes)
	}
	logged(res, err != nil)
	e.report(ctx, step, time.Since(began), res, err)
	if err != nil {
		err = errors.Join(err, discardWhenFull(step.Root))
	}
	return nil, err
}

// report tells what a step used.
func (e *stepExecutor) report(ctx context.Context, step *sandbox.Step, took time.Duration, res *sandbox.Result, err error) {
	if tell := e.runtimes.cfg.OnStep; tell != nil {
		v := vertexOf(ctx)
		tell(StepReport{Domain: e.domain, Vertex: v.digest, Name: v.name, Duration: took, Limits: step.Limits, Result: res, Err: err})
	}
}

// Exec implements executor.Executor.
func (e *stepExecutor) Exec(ctx context.Context, id string, process executor.ProcessInfo) error {
	if err := e.policy.checkProcess(e.domain, process.Meta); err != nil {
		return err
	}
	rt, err := e.runtimes.get(ctx, e.domain.Sandbox)
	if err != nil {
		return err
	}
	res, err := rt.Exec(ctx, id, newProcess(process))
	if err != nil {
		return err
	}
	return exitError(ctx, res, sandbox.Limits{}, process.Meta.ValidExitCodes)
}

func (e *stepExecutor) newStep(ctx context.Context, id string, process executor.ProcessInfo) (*sandbox.Step, error) {
	if id == "" {
		id = identity.NewID()
	}
	step := &sandbox.Step{
		ID: id, Owner: e.owner, Build: vertexOf(ctx).build, Process: newProcess(process), Hostname: process.Meta.Hostname,
		Network: sandbox.NetworkMode(networkOf(process.Meta.NetMode)),
	}
	var err error
	if step.Limits, err = e.policy.limits(ctx, e.domain, process.Meta); err != nil {
		return nil, err
	}
	if step.Egress, err = e.policy.egressOf(e.domain, vertexOf(ctx).destinations); err != nil {
		return nil, err
	}
	for _, h := range process.Meta.ExtraHosts {
		ip, ok := netip.AddrFromSlice(h.IP)
		if !ok {
			return nil, fmt.Errorf("extra host %q: %v is not an IP address", h.Host, h.IP)
		}
		step.ExtraHosts = append(step.ExtraHosts, sandbox.HostEntry{Name: h.Host, IP: ip.Unmap()})
	}
	return step, nil
}

// newProcess translates a process that policy has let pass.
func newProcess(info executor.ProcessInfo) sandbox.Process {
	meta := info.Meta
	p := sandbox.Process{
		Args: meta.Args, Env: meta.Env, Cwd: absolute("/", meta.Cwd), User: meta.User, Terminal: meta.Tty,
		Stdin: info.Stdin, Signal: info.Signal,
	}
	if info.Stdout != nil {
		p.Stdout = io.Writer(info.Stdout)
	}
	if info.Stderr != nil {
		p.Stderr = io.Writer(info.Stderr)
	}
	for _, u := range meta.Ulimit {
		p.Rlimits = append(p.Rlimits, sandbox.Rlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	if info.Resize != nil {
		p.Resize = latestSize(info.Resize)
	}
	return p
}

// latestSize forwards terminal sizes until in is closed. It never blocks: a size
// that nobody took is replaced by the next.
func latestSize(in <-chan executor.WinSize) <-chan sandbox.WindowSize {
	out := make(chan sandbox.WindowSize, 1)
	go func() {
		for w := range in {
			select {
			case <-out:
			default:
			}
			out <- sandbox.WindowSize{Rows: uint16(w.Rows), Cols: uint16(w.Cols)}
		}
	}()
	return out
}

func absolute(base, p string) string {
	if path.IsAbs(p) {
		return path.Clean(p)
	}
	return path.Join("/", base, p)
}
