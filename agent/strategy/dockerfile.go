package strategy

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/agent/steplimits"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	dockerfileFrontend = "dockerfile.v0"
	dockerfileName     = "Dockerfile"
	// dockerfileMount is the name of the in-memory directory of an inline Dockerfile.
	dockerfileMount = "dockerfile"

	networkNone = "none"
)

// dockerfile plans a build of a Dockerfile.
func (p *planner) dockerfile() gateway.BuildFunc {
	d := p.spec.GetDockerfile()
	p.dockerfileAttrs(d)
	src := p.source
	return func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		files, err := src.resolve(ctx, c)
		if err != nil {
			return nil, err
		}
		def, err := files.state.Marshal(ctx, llb.WithCaps(c.BuildOpts().LLBCaps))
		if err != nil {
			return nil, fmt.Errorf("write definition of the source: %w", err)
		}
		inputs := map[string]*pb.Definition{"context": def.ToPB(), dockerfileMount: def.ToPB()}
		if d.GetInline() != "" {
			delete(inputs, dockerfileMount)
		}
		// The client adds the caches to the options that it was given.
		opts := maps.Clone(c.BuildOpts().Opts)
		res, err := c.Solve(ctx, gateway.SolveRequest{Frontend: dockerfileFrontend, FrontendOpt: opts, FrontendInputs: inputs})
		if err != nil {
			return nil, err
		}
		return withRevision(res, files.revision), nil
	}
}

// withRevision reports the commit that was built.
func withRevision(res *gateway.Result, revision string) *gateway.Result {
	if revision != "" {
		res.AddMeta(RevisionKey, []byte(revision))
	}
	return res
}

// dockerfileAttrs sets the options of the front end.
func (p *planner) dockerfileAttrs(d *agentv1.DockerfileStrategy) {
	attrs := p.opt.FrontendAttrs
	attrs["filename"] = dockerfileName
	if d.GetPath() != "" {
		attrs["filename"], _ = cleanRelative(d.GetPath())
	}
	if d.GetInline() != "" {
		p.opt.LocalMounts[dockerfileMount] = inlineFS([]*agentv1.InlineFile{{Path: dockerfileName, Content: []byte(d.GetInline())}}, 0)
		attrs["dockerfilekey"] = dockerfileMount
		attrs["filename"] = dockerfileName
	}
	if p.source.uri != "" {
		// It changes nothing but what provenance calls the source.
		attrs["input:context"] = p.source.uri
	}
	if d.GetTarget() != "" {
		attrs["target"] = d.GetTarget()
	}
	for k, v := range d.GetBuildArgs() {
		attrs["build-arg:"+k] = v
	}
	if epoch := p.spec.GetSourceDateEpoch(); epoch > 0 {
		attrs["build-arg:SOURCE_DATE_EPOCH"] = strconv.FormatInt(epoch, 10)
	}
	for k, v := range d.GetLabels() {
		attrs["label:"+k] = v
	}
	var hosts []string
	for _, name := range slices.Sorted(maps.Keys(d.GetExtraHosts())) {
		if addr, err := parseAddress(d.GetExtraHosts()[name]); err == nil {
			hosts = append(hosts, name+"="+addr.String())
		}
	}
	if len(hosts) > 0 {
		attrs["add-hosts"] = strings.Join(hosts, ",")
	}
	var names []string
	for _, s := range p.spec.GetPlatforms() {
		if pl, err := parsePlatform(s); err == nil {
			names = append(names, platforms.FormatAll(pl))
		}
	}
	if len(names) > 0 {
		attrs["platform"] = strings.Join(names, ",")
	}
	for name, value := range p.spec.GetSource().GetNamedContexts() {
		familiar, ok := contextName(name)
		if ok {
			attrs["context:"+familiar] = value
		}
	}
	if n := p.spec.GetResources().GetMemoryBytes(); n > 0 {
		attrs["memory"] = strconv.FormatInt(n, 10)
	}
	if n := p.spec.GetResources().GetCpuMillis(); n > 0 {
		attrs["cpuperiod"], attrs["cpuquota"] = strconv.Itoa(cpuPeriod), strconv.FormatInt(cpuQuota(n), 10)
	}
	if l := steplimits.Encode(steplimits.Of(p.spec.GetResources())); l != "" {
		attrs[steplimits.Key] = l
	}
	if d := p.spec.GetDestinations(); len(d) > 0 {
		attrs[steplimits.DestinationsKey] = steplimits.EncodeDestinations(d)
	}
	if p.spec.GetNoCache() {
		attrs["no-cache"] = ""
	}
	if p.spec.GetPull() {
		attrs["image-resolve-mode"] = pb.AttrImageResolveModeForcePull
	}
	if p.spec.GetNetwork() == agentv1.NetworkMode_NETWORK_MODE_NONE {
		attrs["force-network-mode"] = networkNone
	}
}
