package engine

import (
	"context"
	"path"
	"strings"
	"sync"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/llbsolver/linuxresources"
	"github.com/moby/buildkit/solver/llbsolver/ops"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/agent/steplimits"
)

// vertex is what the solver knows of a step and does not tell its executor.
type vertex struct {
	// digest names the step in progress and in events; name is for people.
	digest digest.Digest
	name   string
	// mounts are types of mounts by destination, as policy names them.
	mounts map[string]string
	// limits has the description of what the build asks for; see package steplimits.
	limits string
	// destinations has that of what alone the step may connect to.
	destinations string
	// build is what only the steps of one call of a front end have; empty: it was none.
	build string
}

type vertexKey struct{}

// vertexOf returns the vertex whose step ctx is for; the zero value: it is for none, as
// when a front end runs a container.
func vertexOf(ctx context.Context) vertex {
	v, _ := ctx.Value(vertexKey{}).(vertex)
	return v
}

// vertexWorker is BuildKit's worker, but tells the executor which step it runs, and has
// steps that write files keep nothing when they have filled the disk.
type vertexWorker struct {
	*base.Worker
	expected *expectedSteps
	// warm starts preparing sandboxes.
	warm func()
}

var _ worker.Worker = vertexWorker{}

// Prune implements worker.Worker.
func (w vertexWorker) Prune(ctx context.Context, removed chan client.UsageInfo, rules ...client.PruneInfo) error {
	releaseFailed()
	return w.Worker.Prune(ctx, removed, rules...)
}

// ResolveOp implements worker.Worker.
func (w vertexWorker) ResolveOp(v solver.Vertex, b frontend.FrontendLLBBridge, sm *session.Manager, proxy worker.ProxyOpt) (solver.Op, error) {
	op, _ := v.Sys().(*pb.Op)
	if file := op.GetFile(); file != nil {
		trees := &notedTrees{Manager: w.CacheManager()}
		f, err := ops.NewFileOp(v, &pb.Op_File{File: file}, trees, w.ParallelismSem, w.Worker)
		return fileOp{f, trees}, err
	}
	exec := op.GetExec()
	if exec == nil {
		return w.Worker.ResolveOp(v, b, sm, proxy)
	}
	var resources *pb.LinuxResources
	if m, ok := v.Options().Metadata.(*linuxresources.Metadata); ok && m != nil {
		resources = m.LinuxResources
	}
	w.expected.add()
	if v.Options().IgnoreCache {
		w.warm() // it is sure to run
	}
	e := &vertexExecutor{Executor: w.Executor(), vertex: newVertex(v, exec), expected: w.expected}
	// A network that is watched is refused by the executor, whoever asks for it.
	watched := proxy.Network && exec.Network != pb.NetMode_NONE
	return ops.NewExecOp(v, &pb.Op_Exec{Exec: exec}, op.Platform, w.CacheManager(), w.ParallelismSem, sm, e, w.Worker, resources, watched)
}

func newVertex(v solver.Vertex, exec *pb.ExecOp) vertex {
	out := vertex{digest: v.Digest(), name: v.Name(), limits: v.Options().Description[steplimits.Key], destinations: v.Options().Description[steplimits.DestinationsKey],
		build: v.Options().Description[buildKey], mounts: map[string]string{}}
	for _, m := range exec.GetMounts() {
		dest := m.GetDest()
		if !path.IsAbs(dest) {
			dest = path.Join("/", exec.GetMeta().GetCwd(), dest)
		}
		out.mounts[path.Clean(dest)] = strings.ToLower(m.GetMountType().String())
	}
	return out
}

// vertexExecutor runs the process of one vertex.
type vertexExecutor struct {
	executor.Executor
	vertex   vertex
	expected *expectedSteps
	begun    sync.Once
}

// Run implements executor.Executor.
func (e *vertexExecutor) Run(ctx context.Context, id string, root executor.Mount, mounts []executor.Mount, process executor.ProcessInfo, started chan<- struct{}) (resourcestypes.Recorder, error) {
	e.begun.Do(e.expected.begin)
	rec, err := e.Executor.Run(context.WithValue(ctx, vertexKey{}, e.vertex), id, root, mounts, process, started)
	if err == nil && ctx.Err() != nil {
		// Nobody waits for the result any more: BuildKit, which has let the vertex go,
		// would hold it until the process ends.
		err = context.Cause(ctx)
	}
	return rec, err
}
