package engine

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/frontend/gateway"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/worker"

	"github.com/kiln-build/kiln/sandbox/policy"
)

// frontendPolicy says which front ends may run.
type frontendPolicy struct {
	// allowed holds normalised references with digests.
	allowed []string
}

func newFrontendPolicy(refs []string) (*frontendPolicy, error) {
	p := &frontendPolicy{}
	for _, r := range refs {
		key, ok := frontendKey(r)
		if !ok {
			return nil, fmt.Errorf("front end %q: want an image reference with a digest, as in name@sha256:…", r)
		}
		p.allowed = append(p.allowed, key)
	}
	return p, nil
}

// frontendKey returns the repository and digest of ref, which is all that decides
// what runs.
func frontendKey(ref string) (string, bool) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", false
	}
	d, ok := named.(reference.Digested)
	if !ok {
		return "", false
	}
	return reference.TrimNamed(named).Name() + "@" + d.Digest().String(), true
}

// frontends returns the front ends of a domain.
func (p *frontendPolicy) frontends(infos worker.Infos, rules *stepPolicy, d Domain) (map[string]frontend.Frontend, error) {
	gw, err := gateway.NewGatewayFrontend(infos, nil)
	if err != nil {
		return nil, fmt.Errorf("make front end: %w", err)
	}
	builtin := forwarder.NewGatewayForwarder(infos, buildDockerfile)
	checked := func(f frontend.Frontend, name func(map[string]string) string) frontend.Frontend {
		return &checkedFrontend{Frontend: f, name: name, policy: rules, domain: d}
	}
	return map[string]frontend.Frontend{
		"dockerfile.v0": checked(builtin, func(map[string]string) string { return policy.BuiltIn }),
		"gateway.v0": checked(&externalFrontend{policy: p, builtin: builtin, gateway: gw},
			func(opts map[string]string) string { return policy.Frontend(opts[frontend.KeySource]) }),
	}, nil
}

// externalFrontend decides what a syntax line or a client's source option runs.
type externalFrontend struct {
	policy           *frontendPolicy
	builtin, gateway frontend.Frontend
}

// Solve runs the built-in front end for Docker's own, the named one when the
// policy has it, and refuses every other.
func (f *externalFrontend) Solve(ctx context.Context, bridge frontend.FrontendLLBBridge, exec executor.Executor, opts map[string]string, inputs map[string]*pb.Definition, sid string, sm *session.Manager) (*frontend.Result, error) {
	source := opts[frontend.KeySource]
	if _, err := reference.ParseNormalizedNamed(source); err != nil {
		return nil, fmt.Errorf("front end %q: not an image reference: %w", source, err)
	}
	if policy.Frontend(source) == policy.BuiltIn {
		opts = maps.Clone(opts)
		if opts["cmdline"] == "" {
			// Tells the front end that its syntax line has been acted on.
			opts["cmdline"] = source
		}
		return f.builtin.Solve(ctx, bridge, exec, opts, inputs, sid, sm)
	}
	if key, ok := frontendKey(source); ok && slices.Contains(f.policy.allowed, key) {
		return f.gateway.Solve(ctx, bridge, exec, opts, inputs, sid, sm)
	}
	return nil, fmt.Errorf("front end %q is not allowed: the Dockerfile front end is built in (docker/dockerfile); any other must be listed by digest in the configuration", source)
}
