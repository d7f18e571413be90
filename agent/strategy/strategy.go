package strategy

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/agent/strategy/sessions"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// RevisionKey is the key of the exporter's response under which a plan reports the
// commit of its git source. It is absent for other sources.
const RevisionKey = "frontend.kiln.source.revision"

// Inputs is what a plan is made of.
type Inputs struct {
	// Spec says what to build. New checks it with Validate.
	Spec *agentv1.BuildSpec
	// Credentials has what the spec names. New checks it with CheckCredentials. It is
	// not copied: the caller leaves it unchanged until the plan is closed. May be nil.
	Credentials *agentv1.Credentials
	// UploadFile returns the path of the archive that was uploaded under a digest,
	// which it has verified. The file must stay until the plan is closed. It is needed
	// for a spec with an uploaded source only.
	UploadFile func(digest string) (string, error)
	// Platform is what steps run on, such as "linux/amd64"; empty: that of this
	// process.
	Platform string
}

// Plan is what BuildKit's client runs:
//
//	c.Build(ctx, plan.Opt, "kiln", plan.Build, status)
//
// It is for one run. The caller closes it when that has ended.
type Plan struct {
	// Opt has the exports, caches and sessions. The caller may set Ref and what else
	// is its own.
	Opt client.SolveOpt
	// Build makes the result. It is never nil.
	Build gateway.BuildFunc
	// Images are the names of the outputs in full, in their order, which are pushed and
	// stored when the run ended well.
	Images []string

	loan *sessions.Loan
	// mu guards cause.
	mu    sync.Mutex
	cause error
}

// Close ends what the plan lent to its session. It may be called more than once.
func (p *Plan) Close() error {
	p.loan.Close()
	return nil
}

// Cause returns the error with which Build ended, which loses its type on the way
// through the engine: a *StepTimeoutError, a *SourceError, or another. It is nil
// when Build did not end or ended well.
func (p *Plan) Cause() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cause
}

// SourceError is a failure to get the source of a build, or to find in it what the
// spec names.
type SourceError struct {
	// Field of the spec that says what was wanted.
	Field string
	err   error
}

// Error implements error.
func (e *SourceError) Error() string { return e.Field + ": " + e.err.Error() }

// Unwrap returns the cause.
func (e *SourceError) Unwrap() error { return e.err }

func sourceError(field, format string, args ...any) error {
	return &SourceError{Field: field, err: fmt.Errorf(format, args...)}
}

// planner makes one plan.
type planner struct {
	in       Inputs
	spec     *agentv1.BuildSpec
	platform ocispecs.Platform
	opt      client.SolveOpt
	loan     *sessions.Loan
	source   *source
	images   []string
}

// New makes a plan. Its errors are those of Validate and CheckCredentials, or that
// of UploadFile.
func New(_ context.Context, in Inputs) (*Plan, error) {
	if err := Validate(in.Spec); err != nil {
		return nil, err
	}
	if err := CheckCredentials(in.Spec, in.Credentials); err != nil {
		return nil, err
	}
	p := &planner{in: in, spec: in.Spec, platform: platforms.Normalize(platforms.DefaultSpec()), opt: client.SolveOpt{
		FrontendAttrs: map[string]string{}, LocalMounts: map[string]fsutil.FS{},
	}}
	if in.Platform != "" {
		var err error
		if p.platform, err = parsePlatform(in.Platform); err != nil {
			return nil, fmt.Errorf("node's platform: %w", err)
		}
	}
	p.loan = newLoan(in.Spec, in.Credentials)
	var err error
	if p.source, err = p.newSource(); err != nil {
		return nil, err
	}
	var build gateway.BuildFunc
	if in.Spec.GetDockerfile() != nil {
		build = p.dockerfile()
	} else if build, err = p.steps(); err != nil {
		return nil, err
	}
	p.attestations()
	p.outputs()
	p.caches()
	if p.opt.Session, err = p.loan.Attachables(); err != nil {
		return nil, fmt.Errorf("prepare credentials: %w", err)
	}
	plan := &Plan{Opt: p.opt, Images: p.images, loan: p.loan}
	plan.Build = func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		res, err := build(ctx, c)
		plan.mu.Lock()
		defer plan.mu.Unlock()
		plan.cause = err
		return res, err
	}
	return plan, nil
}

// stepsPlatform refuses a platform that the node cannot run.
func (p *planner) stepsPlatform() error {
	for _, s := range p.spec.GetPlatforms() {
		want, err := parsePlatform(s)
		if err != nil {
			return err
		}
		if !platforms.Only(p.platform).Match(want) {
			return &InvalidError{Fields: []*FieldError{{
				Field:   item("spec.platforms", 0),
				Message: fmt.Sprintf("steps run on the node, which is %s", platforms.FormatAll(p.platform)),
			}}}
		}
	}
	return nil
}

var errNoResult = errors.New("the front end gave no result")
