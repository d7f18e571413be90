package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/kiln-build/kiln/agent/queue"
	"github.com/kiln-build/kiln/agent/record"
	"github.com/kiln-build/kiln/agent/strategy"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	// maxSpec and maxCredentials bound what StartBuild takes, in bytes.
	maxSpec        = 2 << 20
	maxCredentials = 8 << 20
)

// StartBuild implements agentv1.BuildServiceServer.
func (a *Agent) StartBuild(ctx context.Context, req *agentv1.StartBuildRequest) (*agentv1.StartBuildResponse, error) {
	tenant, err := tenantFor(ctx, req.GetTenant())
	if err != nil {
		return nil, err
	}
	key := record.Key{Tenant: tenant, ID: req.GetBuildId()}
	if err := record.ValidateID(key.ID); err != nil {
		return nil, invalid("build_id", "%v", err)
	}
	// What was accepted once is answered in the same way whatever policy says now.
	switch there, err := a.records.Get(key); {
	case err == nil:
		return sameBuild(there, req)
	case !errors.Is(err, record.ErrNotFound):
		return nil, statusOf(err)
	}
	spec, err := a.acceptable(ctx, tenant, req.GetSpec())
	if err != nil {
		return nil, statusOf(err)
	}
	if proto.Size(req.GetCredentials()) > maxCredentials {
		return nil, invalid("credentials", "has more than %d bytes", maxCredentials)
	}
	if err := strategy.CheckCredentials(spec, req.GetCredentials()); err != nil {
		return nil, statusOf(err)
	}
	b, err := a.begin(ctx, key, req, spec)
	var exists *record.ExistsError
	if errors.As(err, &exists) {
		return sameBuild(exists.Build, req)
	}
	if err != nil {
		return nil, statusOf(err)
	}
	return &agentv1.StartBuildResponse{Build: b}, nil
}

// sameBuild answers a request for a build that is there.
func sameBuild(there *agentv1.Build, req *agentv1.StartBuildRequest) (*agentv1.StartBuildResponse, error) {
	if !proto.Equal(there.GetSpec(), req.GetSpec()) {
		return nil, ruled(codes.AlreadyExists, "BUILD_EXISTS", there.GetBuildId(),
			fmt.Sprintf("build_id: build %q exists with another spec; choose another ID", there.GetBuildId()))
	}
	return &agentv1.StartBuildResponse{Build: there}, nil
}

// acceptable returns a tenant's spec with its defaults, or why this node does not
// take it. What it checks needs no place in the queue.
func (a *Agent) acceptable(_ context.Context, tenant string, spec *agentv1.BuildSpec) (*agentv1.BuildSpec, error) {
	if proto.Size(spec) > maxSpec {
		return nil, invalid("spec", "has %d bytes, %d is the most", proto.Size(spec), maxSpec)
	}
	if err := strategy.Validate(spec); err != nil {
		return nil, err
	}
	full := completed(a.cfg.Policy, tenant, spec)
	if err := a.cfg.Policy.Check(tenant, full); err != nil {
		return nil, err
	}
	if err := a.sandboxWorks(full.GetSandbox()); err != nil {
		return nil, err
	}
	for i, o := range full.GetOutputs() {
		if o.GetNode() != nil && a.cfg.Images == nil {
			return nil, ruled(codes.FailedPrecondition, "NO_NODE_RUNTIME", field("spec.outputs", i)+".node",
				field("spec.outputs", i)+".node: this agent is not connected to the node's container runtime")
		}
	}
	if up := full.GetSource().GetUpload(); up != nil && !a.uploads.Has(tenant, digest.Digest(up.GetDigest())) {
		return nil, noUpload()
	}
	if err := a.queue.Fits(needs(full)); err != nil {
		return nil, err
	}
	return full, nil
}

func noUpload() error {
	return ruled(codes.FailedPrecondition, "NO_UPLOAD", "spec.source.upload.digest",
		"spec.source.upload.digest: this node has no such upload of the tenant; it may have expired, or belong to a build that has ended: upload it again")
}

// sandboxWorks tells whether the node has a class of sandbox.
func (a *Agent) sandboxWorks(class agentv1.SandboxClass) error {
	problem := "is not enabled on this node"
	for _, s := range a.cfg.Sandboxes() {
		if s.GetClass() != class {
			continue
		}
		if s.GetAvailable() {
			return nil
		}
		problem = "is not available on this node: " + s.GetProblem()
	}
	return ruled(codes.FailedPrecondition, "SANDBOX_UNAVAILABLE", "spec.sandbox", fmt.Sprintf("spec.sandbox: %s %s", className(class), problem))
}

// needs is what a build reserves.
func needs(spec *agentv1.BuildSpec) queue.Resources {
	r := spec.GetResources()
	return queue.Resources{CPUMillis: r.GetCpuMillis(), MemoryBytes: r.GetMemoryBytes(), DiskBytes: r.GetDiskBytes()}
}

// begin queues and stores a build, and starts what runs it. On an error nothing of
// it is left.
func (a *Agent) begin(ctx context.Context, key record.Key, req *agentv1.StartBuildRequest, spec *agentv1.BuildSpec) (*agentv1.Build, error) {
	if !a.enter() {
		return nil, unavailable()
	}
	j := newJob(a, ctx, key, spec, req.GetCredentials())
	b, err := a.admit(j, req.GetSpec())
	if err != nil {
		j.abandon()
		a.working.Done()
		return nil, err
	}
	a.uploads.Forget(key.Tenant, key.ID) // it has its source
	go func() {
		defer a.working.Done()
		a.run(j)
	}()
	return b, nil
}

// enter counts one that works for the agent, unless it drains.
func (a *Agent) enter() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.draining {
		return false
	}
	a.working.Add(1)
	return true
}

// admit takes what a job needs: its archive, its place in the queue, its record.
func (a *Agent) admit(j *job, spec *agentv1.BuildSpec) (*agentv1.Build, error) {
	var err error
	if up := j.spec.GetSource().GetUpload(); up != nil {
		if j.archive, err = a.uploads.Hold(j.key.Tenant, digest.Digest(up.GetDigest())); err != nil {
			return nil, noUpload()
		}
	}
	running, waiting := a.cfg.Policy.Share(j.key.Tenant)
	j.ticket, err = a.queue.Enter(queue.Request{
		Tenant: j.key.Tenant, Needs: needs(j.spec), MaxRunning: running, MaxQueued: waiting, Moved: j.moved,
	})
	if err != nil {
		return nil, err
	}
	w, err := a.records.Create(&agentv1.Build{
		BuildId: j.key.ID, Tenant: j.key.Tenant, Spec: spec, Sandbox: j.spec.GetSandbox(), Node: a.cfg.Node,
		QueuePosition: int32(j.ticket.Position()),
	})
	if err != nil {
		return nil, err
	}
	j.writer.Store(w)
	a.mu.Lock()
	a.jobs[j.key] = j
	a.mu.Unlock()
	return w.Build(), nil
}

// refusals are the reasons for which StartBuild would not take a spec, and the code
// that it would answer with.
func (a *Agent) refusals(ctx context.Context, tenant string, spec *agentv1.BuildSpec) ([]string, codes.Code) {
	if a.Draining() {
		return []string{"the agent of this node ends and takes no builds"}, codes.Unavailable
	}
	full, err := a.acceptable(ctx, tenant, spec)
	if err == nil {
		running, waiting := a.cfg.Policy.Share(tenant)
		err = a.queue.Check(queue.Request{Tenant: tenant, Needs: needs(full), MaxRunning: running, MaxQueued: waiting})
	}
	if err == nil {
		return nil, codes.OK
	}
	code := status.Code(statusOf(err))
	if fields := strategy.Fields(err); len(fields) > 0 {
		var out []string
		for _, f := range fields {
			out = append(out, f.Error())
		}
		return out, code
	}
	return []string{message(err)}, code
}
