// Package agenttwin is an agent in memory, for tests of what talks to agents: a real gRPC
// server of kiln.agent.v1 with mutual TLS that plays builds instead of running them.
//
// It keeps what the agent's API promises: acceptance is idempotent by ID and survives Kill
// and Restart, events are numbered without gaps and end with the result, and a build that
// was running when it was killed ends as interrupted.
//
// A build plays what its build argument PLAY says: "hang" runs until it is cancelled, "fail"
// fails in a step, anything else succeeds.
package agenttwin

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Digest is that of the image of every build that succeeds.
const Digest = "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"

// Twin is an agent in memory. Its methods may be called concurrently.
type Twin struct {
	agentv1.UnimplementedBuildServiceServer

	// Node that it says it is on.
	Node string
	tls  *tls.Config

	// mu guards the rest; changed is closed and replaced when a build changes.
	mu      sync.Mutex
	changed chan struct{}
	server  *grpc.Server
	address string
	builds  map[string]*played
	uploads map[string]bool
	parts   map[string]*arriving // by build
	started int
	probe   *agentv1.ProbeResponse
	refusal error
	plays   sync.WaitGroup
}

// played is a build that the twin plays.
type played struct {
	build  *agentv1.Build
	creds  *agentv1.Credentials
	events []*agentv1.Event
	cancel context.CancelFunc
}

// New returns a twin that does not serve yet.
func New(node string, tlsConfig *tls.Config) *Twin {
	return &Twin{Node: node, tls: tlsConfig, changed: make(chan struct{}), builds: map[string]*played{}, uploads: map[string]bool{}, parts: map[string]*arriving{},
		probe: &agentv1.ProbeResponse{Runnable: true, Slots: 4}}
}

// Serve serves at an address until Kill.
func (t *Twin) Serve(address string) error {
	t.mu.Lock()
	for _, p := range t.builds {
		t.end(p, &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_INTERRUPTED, Failure: &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_INTERRUPTED, Message: "the agent ended"}})
	}
	t.mu.Unlock()
	return t.listen(address)
}

func (t *Twin) listen(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("serve agent twin: %w", err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(t.tls)))
	agentv1.RegisterBuildServiceServer(s, t)
	t.mu.Lock()
	t.server, t.address = s, l.Addr().String()
	t.mu.Unlock()
	go func() { _ = s.Serve(l) }()
	return nil
}

// Kill ends the server and everything that it plays, as SIGKILL does. What it has
// recorded stays.
func (t *Twin) Kill() {
	t.mu.Lock()
	s := t.server
	t.server = nil
	for _, p := range t.builds {
		p.cancel()
	}
	t.mu.Unlock()
	if s != nil {
		s.Stop()
	}
	t.plays.Wait()
}

// Pause makes the agent unreachable while its builds go on, as a network partition does.
func (t *Twin) Pause() {
	t.mu.Lock()
	s := t.server
	t.server = nil
	t.mu.Unlock()
	if s != nil {
		s.Stop()
	}
}

// Resume makes it reachable again.
func (t *Twin) Resume() error { return t.listen(t.address) }

// Restart serves again where it did before.
func (t *Twin) Restart() error { return t.Serve(t.address) }

// Forget loses all records, as an agent with a new disk does.
func (t *Twin) Forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.builds {
		p.cancel()
	}
	t.builds = map[string]*played{}
}

// SetProbe sets what Probe answers.
func (t *Twin) SetProbe(p *agentv1.ProbeResponse) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.probe = p
}

// Refuse makes StartBuild fail with err until it is nil again.
func (t *Twin) Refuse(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refusal = err
}

// Started returns how many builds were accepted; a repetition of a call does not count.
func (t *Twin) Started() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.started
}

// Running returns the IDs of builds that have not ended.
func (t *Twin) Running() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []string
	for id, p := range t.builds {
		if p.build.Result == nil {
			out = append(out, id)
		}
	}
	return out
}

// Build returns a build with its credentials; nil when there is none.
func (t *Twin) Build(id string) (*agentv1.Build, *agentv1.Credentials) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.builds[id]; p != nil {
		return proto.CloneOf(p.build), proto.CloneOf(p.creds)
	}
	return nil, nil
}

// add records an event. The caller holds mu.
func (t *Twin) add(p *played, e *agentv1.Event) {
	e.Offset, e.Time = uint64(len(p.events)), timestamppb.Now()
	p.events = append(p.events, e)
	p.build.Events = uint64(len(p.events))
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *Twin) setState(p *played, s agentv1.BuildState) {
	p.build.State = s
	t.add(p, &agentv1.Event{Kind: &agentv1.Event_Status{Status: &agentv1.StatusEvent{State: s}}})
}

func (t *Twin) end(p *played, r *agentv1.BuildResult) {
	if p.build.Result != nil {
		return
	}
	p.build.Result, p.build.State, p.build.EndedAt = r, r.State, timestamppb.Now()
	t.add(p, &agentv1.Event{Kind: &agentv1.Event_Result{Result: r}})
}

// play runs a build's course.
func (t *Twin) play(ctx context.Context, p *played) {
	act := func(f func()) {
		t.mu.Lock()
		defer t.mu.Unlock()
		if ctx.Err() == nil {
			f()
		}
	}
	step := &agentv1.StepResult{Digest: "sha256:1", Name: "[1/1] RUN play", StartedAt: timestamppb.Now()}
	act(func() {
		p.build.StartedAt = timestamppb.Now()
		t.setState(p, agentv1.BuildState_BUILD_STATE_RUNNING)
		t.add(p, &agentv1.Event{Kind: &agentv1.Event_Step{Step: &agentv1.StepEvent{Step: proto.CloneOf(step)}}})
		t.add(p, &agentv1.Event{Kind: &agentv1.Event_Log{Log: &agentv1.LogEvent{Step: step.Digest, Data: []byte("playing\n")}}})
	})
	what := p.build.Spec.GetDockerfile().GetBuildArgs()["PLAY"]
	if what == "hang" {
		<-ctx.Done()
		return
	}
	select {
	case <-ctx.Done():
		return
	case <-time.After(50 * time.Millisecond):
	}
	act(func() {
		step.EndedAt = timestamppb.Now()
		t.add(p, &agentv1.Event{Kind: &agentv1.Event_Step{Step: &agentv1.StepEvent{Step: step}}})
		if what == "fail" {
			t.end(p, &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_FAILED, Steps: []*agentv1.StepResult{step}, Failure: &agentv1.Failure{
				Reason: agentv1.FailureReason_FAILURE_REASON_STEP_FAILED, Message: "RUN play: exit code 3", Step: step.Name, ExitCode: 3,
				Location: &agentv1.SourceLocation{File: "Dockerfile", StartLine: 2, EndLine: 2}, LogTail: "playing\x1b[31m\n",
			}})
			return
		}
		r := &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_SUCCEEDED, ImageDigest: Digest, ImageSize: 42, Steps: []*agentv1.StepResult{step}}
		for _, o := range p.build.Spec.GetOutputs() {
			r.ImageNames = append(r.ImageNames, o.GetRegistry().GetImage()+o.GetNode().GetImage())
		}
		if p.build.Spec.GetSource().GetGit() != nil {
			r.SourceRevision = "0123456789abcdef0123456789abcdef01234567"
		}
		t.end(p, r)
	})
}

// StartBuild accepts a build and plays it.
func (t *Twin) StartBuild(_ context.Context, req *agentv1.StartBuildRequest) (*agentv1.StartBuildResponse, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, ok := t.builds[req.BuildId]; ok {
		if p.build.Tenant != req.Tenant || !proto.Equal(p.build.Spec, req.Spec) {
			return nil, status.Errorf(codes.AlreadyExists, "build_id: %s is another build", req.BuildId)
		}
		return &agentv1.StartBuildResponse{Build: proto.CloneOf(p.build)}, nil
	}
	if t.refusal != nil {
		return nil, t.refusal
	}
	if up := req.GetSpec().GetSource().GetUpload(); up != nil && !t.uploads[req.Tenant+"/"+up.Digest] {
		return nil, noUpload(up.Digest)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &played{creds: req.Credentials, cancel: cancel, build: &agentv1.Build{
		BuildId: req.BuildId, Tenant: req.Tenant, Spec: req.Spec, CreatedAt: timestamppb.Now(), Node: t.Node, Sandbox: req.Spec.GetSandbox(),
	}}
	t.builds[req.BuildId] = p
	t.started++
	t.setState(p, agentv1.BuildState_BUILD_STATE_QUEUED)
	t.plays.Go(func() { t.play(ctx, p) })
	return &agentv1.StartBuildResponse{Build: proto.CloneOf(p.build)}, nil
}

func (t *Twin) find(id, tenant string) (*played, error) {
	p, ok := t.builds[id]
	if !ok || p.build.Tenant != tenant {
		return nil, status.Errorf(codes.NotFound, "build_id: %q is not known", id)
	}
	return p, nil
}

// WatchBuild streams events.
func (t *Twin) WatchBuild(req *agentv1.WatchBuildRequest, stream grpc.ServerStreamingServer[agentv1.WatchBuildResponse]) error {
	next := req.Offset
	for {
		t.mu.Lock()
		p, err := t.find(req.BuildId, req.Tenant)
		if err != nil {
			t.mu.Unlock()
			return err
		}
		ended, changed := p.build.Result != nil, t.changed
		if ended && next > uint64(len(p.events)) {
			t.mu.Unlock()
			return status.Error(codes.OutOfRange, "offset: is beyond the end")
		}
		events := p.events[min(next, uint64(len(p.events))):]
		t.mu.Unlock()
		for _, e := range events {
			if err := stream.Send(&agentv1.WatchBuildResponse{Event: e}); err != nil {
				return err
			}
			next = e.Offset + 1
		}
		if ended || req.NoFollow {
			return nil
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-changed:
		}
	}
}

// CancelBuild ends a build.
func (t *Twin) CancelBuild(_ context.Context, req *agentv1.CancelBuildRequest) (*agentv1.CancelBuildResponse, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.find(req.BuildId, req.Tenant)
	if err != nil {
		return nil, err
	}
	p.cancel()
	t.end(p, &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_CANCELLED, Failure: &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_CANCELLED, Message: req.Reason}})
	return &agentv1.CancelBuildResponse{Build: proto.CloneOf(p.build)}, nil
}

// GetBuild returns a build.
func (t *Twin) GetBuild(_ context.Context, req *agentv1.GetBuildRequest) (*agentv1.GetBuildResponse, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.find(req.BuildId, req.Tenant)
	if err != nil {
		return nil, err
	}
	return &agentv1.GetBuildResponse{Build: proto.CloneOf(p.build)}, nil
}

// ListBuilds returns all builds in one of the states.
func (t *Twin) ListBuilds(_ context.Context, req *agentv1.ListBuildsRequest) (*agentv1.ListBuildsResponse, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := &agentv1.ListBuildsResponse{}
	for _, p := range t.builds {
		for _, s := range req.States {
			if p.build.State == s {
				out.Builds = append(out.Builds, proto.CloneOf(p.build))
			}
		}
	}
	return out, nil
}

// Probe answers what SetProbe was given.
func (t *Twin) Probe(context.Context, *agentv1.ProbeRequest) (*agentv1.ProbeResponse, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return proto.CloneOf(t.probe), nil
}
