package engine

import (
	"context"
	"fmt"
	"maps"

	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/agent/steplimits"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// buildKey is where the description of a step has what only those of one call of a front
// end have; see sandbox.Step.Build.
const buildKey = "kiln.build"

// checkedFrontend runs a front end that policy allows, and has every step that it asks for
// carry the limits of its options, and a name of this call.
type checkedFrontend struct {
	frontend.Frontend
	// name tells what runs, by the options.
	name   func(opts map[string]string) string
	policy *stepPolicy
	domain Domain
}

// Solve implements frontend.Frontend.
func (f *checkedFrontend) Solve(ctx context.Context, bridge frontend.FrontendLLBBridge, exec executor.Executor, opts map[string]string, inputs map[string]*pb.Definition, sid string, sm *session.Manager) (*frontend.Result, error) {
	if err := refusal(policy.CheckFrontend(f.policy.of(f.domain).Rules, f.name(opts))); err != nil {
		return nil, err
	}
	if _, err := steplimits.Decode(opts[steplimits.Key]); err != nil {
		return nil, fmt.Errorf("option of the front end: %w", err)
	}
	if _, err := steplimits.DecodeDestinations(opts[steplimits.DestinationsKey]); err != nil {
		return nil, fmt.Errorf("option of the front end: %w", err)
	}
	described := map[string]string{buildKey: identity.NewID()}
	for _, key := range []string{steplimits.Key, steplimits.DestinationsKey} {
		if opts[key] != "" {
			described[key] = opts[key]
		}
	}
	bridge = &describingBridge{FrontendLLBBridge: bridge, described: described}
	return f.Frontend.Solve(ctx, bridge, exec, opts, inputs, sid, sm)
}

// describingBridge writes into the description of every step that passes.
type describingBridge struct {
	frontend.FrontendLLBBridge
	described map[string]string
}

// Solve implements frontend.FrontendLLBBridge.
func (b *describingBridge) Solve(ctx context.Context, req frontend.SolveRequest, sid string) (*frontend.Result, error) {
	var err error
	if req.Definition != nil {
		if req.Definition, err = describe(req.Definition, b.described); err != nil {
			return nil, err
		}
	}
	if req.Frontend != "" {
		req.FrontendOpt = maps.Clone(req.FrontendOpt)
		if req.FrontendOpt == nil {
			req.FrontendOpt = map[string]string{}
		}
		maps.Copy(req.FrontendOpt, b.described)
		delete(req.FrontendOpt, buildKey) // it gets one of its own
		req.FrontendInputs = maps.Clone(req.FrontendInputs)
		for name, def := range req.FrontendInputs {
			if req.FrontendInputs[name], err = describe(def, b.described); err != nil {
				return nil, err
			}
		}
	}
	return b.FrontendLLBBridge.Solve(ctx, req, sid)
}

// describe returns def with entries in the description of its steps, and leaves limits that
// are there. A description is no part of what a step is.
func describe(def *pb.Definition, entries map[string]string) (*pb.Definition, error) {
	out := &pb.Definition{Def: def.GetDef(), Metadata: maps.Clone(def.GetMetadata()), Source: def.GetSource()}
	if out.Metadata == nil {
		out.Metadata = map[string]*pb.OpMetadata{}
	}
	for _, data := range def.GetDef() {
		var op pb.Op
		if err := op.UnmarshalVT(data); err != nil {
			return nil, fmt.Errorf("read definition of a step: %w", err)
		}
		if op.GetExec() == nil {
			continue
		}
		key := digest.FromBytes(data).String()
		meta := &pb.OpMetadata{}
		if known := out.Metadata[key]; known != nil {
			meta = known.CloneVT()
		}
		if meta.Description == nil {
			meta.Description = map[string]string{}
		}
		for k, v := range entries {
			// What a front end says in place of the build counts for limits only, which
			// policy bounds.
			if k != steplimits.Key || meta.Description[k] == "" {
				meta.Description[k] = v
			}
		}
		out.Metadata[key] = meta
	}
	return out, nil
}
