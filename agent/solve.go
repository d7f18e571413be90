package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/identity"

	"github.com/kiln-build/kiln/agent/failure"
	"github.com/kiln-build/kiln/agent/progress"
	"github.com/kiln-build/kiln/agent/strategy"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/snapshot/nodestore"
)

const (
	// product names kiln to the engine.
	product = "kiln"
	// flushInterval is how often progress is looked at that was held back.
	flushInterval = time.Second
	// forgetTime bounds how long it takes to forget an image that was handed on.
	forgetTime = 30 * time.Second
)

// patience is how long a solve may take to end after its context has.
const patience = 30 * time.Second

// solver has the engine build.
type solver struct {
	cfg      Config
	patience time.Duration
}

// Run opens the engine, which the job keeps, and builds.
func (s *solver) Run(ctx context.Context, j *job) *agentv1.BuildResult {
	session, err := s.cfg.Engines.Open(ctx, domainOf(j))
	if err != nil {
		if result := ended(ctx); result != nil {
			return result
		}
		return internal("The engine cannot be opened: %v", err)
	}
	j.session = session
	plan, err := strategy.New(ctx, strategy.Inputs{
		Spec: j.spec, Credentials: j.creds, Platform: s.cfg.Platforms[0],
		UploadFile: func(string) (string, error) {
			if j.archive == nil {
				return "", errors.New("the build has no upload")
			}
			return j.archive.Path, nil
		},
	})
	if err != nil {
		return failed(&agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT, Message: failure.Text(err.Error())})
	}
	defer plan.Close()
	plan.Opt.Ref = identity.NewID()
	plan.Opt.SourcePolicy = s.cfg.Policy.Sources(j.key.Tenant)
	return s.solve(ctx, j, plan)
}

// domainOf is where the steps of a build run.
func domainOf(j *job) Domain {
	return Domain{Tenant: j.key.Tenant, Sandbox: classes[j.spec.GetSandbox()]}
}

func (s *solver) solve(ctx context.Context, j *job, plan *strategy.Plan) *agentv1.BuildResult {
	usages := s.cfg.Steps.follow(domainOf(j))
	defer usages.end()
	status, told := make(chan *client.SolveStatus, 16), make(chan *progress.Translator, 1)
	go func() { told <- s.tell(j, status, usages) }()
	resp, err := s.build(ctx, j, plan, status)
	if errors.Is(err, errStuck) {
		s.cfg.Logger.Error("the engine does not end a build; it is given up", "tenant", j.key.Tenant, "build", j.key.ID)
		if result := ended(ctx); result != nil {
			return result
		}
		return internal("%v", err)
	}
	events := <-told
	if err == nil {
		if err = s.handOn(ctx, j); err != nil {
			err = &pushError{err}
		}
	}
	result := &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_SUCCEEDED}
	switch end := ended(ctx); {
	case err == nil:
		image(result, j.spec, resp.ExporterResponse)
		result.ImageSize = s.imageSize(ctx, j, resp.ExporterResponse)
	case end != nil:
		result = end
	default:
		result = failed(fault(err, plan.Cause(), events))
	}
	result.Steps = events.Results()
	return result
}

// errStuck says that the engine did not end a solve when it should have.
var errStuck = errors.New("the engine did not end the build in time")

// build runs the solve. When that does not end with its context, it is given up
// with errStuck, and ends when the session is closed. A panic in it is one in the
// caller.
func (s *solver) build(ctx context.Context, j *job, plan *strategy.Plan, status chan *client.SolveStatus) (*client.SolveResponse, error) {
	type outcome struct {
		resp  *client.SolveResponse
		err   error
		panic any
	}
	session, done := j.session, make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() {
			o.panic = recover()
			done <- o
		}()
		o.resp, o.err = session.Build(ctx, plan.Opt, product, plan.Build, status)
	}()
	var late <-chan time.Time
	for over := ctx.Done(); ; {
		select {
		case o := <-done:
			if o.panic != nil {
				panic(o.panic)
			}
			return o.resp, o.err
		case <-over:
			over = nil
			timer := time.NewTimer(s.patience)
			defer timer.Stop()
			late = timer.C
		case <-late:
			return nil, errStuck
		}
	}
}

// tell stores what happens until status is closed.
func (s *solver) tell(j *job, status <-chan *client.SolveStatus, usages *stepUsages) *progress.Translator {
	var broken bool
	t := progress.New(func(ev *agentv1.Event) {
		if err := j.writer.Load().Append(ev); err != nil && !broken {
			broken = true // once is enough: a disk that is full fails every event
			s.cfg.Logger.Warn("events of a build are not stored", "tenant", j.key.Tenant, "build", j.key.ID, "error", err)
		}
	}, s.cfg.Now)
	t.TellUsage(usages.get)
	tick := time.NewTicker(flushInterval)
	defer tick.Stop()
	for {
		select {
		case news, more := <-status:
			if !more {
				t.Flush(true)
				return t
			}
			t.Add(news)
		case <-tick.C:
			t.Flush(false)
		}
	}
}

// image fills in what the exporters say, and the names that the spec gives: of
// several exports the engine tells those of one only.
func image(result *agentv1.BuildResult, spec *agentv1.BuildSpec, facts map[string]string) {
	result.ImageDigest = facts[exptypes.ExporterImageDigestKey]
	result.SourceRevision = failure.Text(facts[strategy.RevisionKey])
	for _, o := range spec.GetOutputs() {
		named, err := fullName(cmp.Or(o.GetRegistry().GetImage(), o.GetNode().GetImage()))
		if err == nil && !slices.Contains(result.ImageNames, named.String()) {
			result.ImageNames = append(result.ImageNames, named.String())
		}
	}
}

// fullName is the name of an image with its registry and tag.
func fullName(image string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return nil, fmt.Errorf("name of the image %q: %w", image, err)
	}
	return reference.TagNameOnly(named), nil
}

// pushError is a failure to hand an image to the node's runtime.
type pushError struct{ err error }

func (e *pushError) Error() string { return e.err.Error() }
func (e *pushError) Unwrap() error { return e.err }

// fault says why a build failed. cause is the error with which its plan ended, which
// is of a type that the engine does not keep.
func fault(err, cause error, steps failure.Steps) *agentv1.Failure {
	f := failure.Of(err, steps)
	var late *strategy.StepTimeoutError
	var source *strategy.SourceError
	var push *pushError
	switch {
	case errors.As(cause, &late):
		f.Reason, f.Step, f.Message = agentv1.FailureReason_FAILURE_REASON_TIMEOUT, failure.Text(late.Step), failure.Text(late.Error())
	case errors.As(cause, &source):
		if f.Reason != agentv1.FailureReason_FAILURE_REASON_DENIED {
			f.Reason = agentv1.FailureReason_FAILURE_REASON_SOURCE
		}
		f.Message = failure.Text(source.Error())
	case len(strategy.Fields(cause)) > 0:
		f.Reason, f.Message = agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT, failure.Text(cause.Error())
	case errors.As(err, &push):
		f.Reason = agentv1.FailureReason_FAILURE_REASON_PUSH
	}
	return f
}

// handOn gives the images that the build has stored to the node's runtime, and has
// the engine forget them.
func (s *solver) handOn(ctx context.Context, j *job) error {
	for i, o := range j.spec.GetOutputs() {
		if o.GetNode() == nil {
			continue
		}
		if err := s.handOnImage(ctx, j, o.GetNode().GetImage()); err != nil {
			return fmt.Errorf("%s.node: store image in the node's container runtime: %w", field("spec.outputs", i), err)
		}
	}
	return nil
}

func (s *solver) handOnImage(ctx context.Context, j *job, image string) (err error) {
	named, err := fullName(image)
	if err != nil {
		return err
	}
	target, content, err := j.session.Image(ctx, named.String())
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTime)
		defer cancel()
		err = errors.Join(err, j.session.DeleteImage(ctx, named.String()))
	}()
	_, err = s.cfg.Images.Receive(ctx, nodestore.Image{Name: named, Target: target, Content: content})
	return err
}
