package agent

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent/steplimits"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// Policy decides what the builds of a tenant may do. Its methods may be called
// concurrently.
type Policy interface {
	// Complete fills in what a valid spec leaves to the tenant's defaults: sandbox,
	// network, resources and timeout. The agent gives it a copy. After it sandbox,
	// network and timeout are set.
	Complete(tenant string, spec *agentv1.BuildSpec)
	// Check returns a *DeniedError when a completed spec wants what the tenant may
	// not have.
	Check(tenant string, spec *agentv1.BuildSpec) error
	// Sources returns what the engine may fetch images from, whatever names them, such as
	// a Dockerfile; nil: from anywhere.
	Sources(tenant string) *spb.Policy
	// Share returns how many builds of the tenant may run and wait at once; 0: no
	// bound but the node's.
	Share(tenant string) (running, waiting int)
}

// DeniedError is what policy refuses. It has at least one rule.
type DeniedError struct {
	Rules []*policy.Denied
}

func (e *DeniedError) Error() string {
	parts := make([]string, len(e.Rules))
	for i, r := range e.Rules {
		parts[i] = r.Error()
	}
	return strings.Join(parts, "; ")
}

// TenantRules is what holds for the builds of one tenant.
type TenantRules struct {
	// Rules must all allow a build.
	Rules []policy.Rules
	// Defaults are the limits of a build that names none; they are cut to what the
	// rules allow.
	Defaults policy.Limits
	// Sandbox and Network are those of a build that names none when no rule has a
	// default; empty: gVisor, and egress.
	Sandbox sandbox.Class
	Network string
	// Timeout is that of a build that names none; it is cut to what the rules allow.
	// 0: DefaultTimeout.
	Timeout time.Duration
	// NodeImages holds patterns (policy.Match) of repositories under which images
	// may be stored in the node's runtime. Whoever may store an image under a name
	// decides what Pods of that name run, so none: nowhere.
	NodeImages []string
	// MaxRunning and MaxQueued bound the tenant's builds; 0: as the node does.
	MaxRunning, MaxQueued int
}

// DefaultTimeout is how long a build may run when neither it nor policy says.
const DefaultTimeout = time.Hour

// Names of networks, as package policy has them.
const (
	networkEgress = "egress"
	networkNone   = "none"
)

// RulePolicy is a Policy of rules by tenant.
type RulePolicy func(tenant string) TenantRules

// Complete implements Policy.
func (p RulePolicy) Complete(tenant string, spec *agentv1.BuildSpec) {
	t := p(tenant)
	got := policy.Complete(t.Rules, request(spec))
	spec.Sandbox = sandboxClass(cmp.Or(got.Class, string(t.Sandbox), string(sandbox.GVisor)))
	spec.Network = networkMode(cmp.Or(got.Network, t.Network, networkEgress))
	if spec.Resources == nil {
		spec.Resources = &agentv1.Resources{}
	}
	setLimits(spec.Resources, request(spec).Limits.Or(t.Defaults, policy.Most(t.Rules)))
	timeout := limit(spec.GetTimeout().AsDuration(), cmp.Or(t.Timeout, DefaultTimeout), got.Timeout)
	spec.Timeout = durationpb.New(timeout)
}

// setLimits writes l to r.
func setLimits(r *agentv1.Resources, l policy.Limits) {
	r.CpuMillis, r.MemoryBytes, r.Pids, r.DiskBytes = l.CPUMillis, l.MemoryBytes, l.PIDs, l.DiskBytes
	r.Inodes, r.OpenFiles, r.LogBytes, r.LogRate, r.ShmBytes = l.Inodes, l.OpenFiles, l.LogBytes, l.LogRate, l.ShmBytes
	r.StepTimeout = nil
	if l.StepTimeout > 0 {
		r.StepTimeout = durationpb.New(l.StepTimeout)
	}
}

// limit returns what was asked for, else the default within what is allowed, else
// what is allowed.
func limit(asked, byDefault, allowed time.Duration) time.Duration {
	switch {
	case asked > 0:
		return asked
	case byDefault > 0 && (allowed <= 0 || byDefault < allowed):
		return byDefault
	}
	return allowed
}

// Check implements Policy.
func (p RulePolicy) Check(tenant string, spec *agentv1.BuildSpec) error {
	t := p(tenant)
	denied := policy.Check(t.Rules, request(spec))
	for _, d := range denied {
		d.Field = cmp.Or(policyFields[d.Field], d.Field)
	}
	for i, o := range spec.GetOutputs() {
		image := o.GetNode().GetImage()
		if image == "" {
			continue
		}
		repository, err := policy.Repository(image)
		if err != nil || !policy.MatchAny(t.NodeImages, repository) || len(t.NodeImages) == 0 {
			denied = append(denied, &policy.Denied{
				Policy: "node-images", Field: field("spec.outputs", i) + ".node.image",
				Rule: "tenant " + tenant + " may store images in the node's runtime under " + orNothing(t.NodeImages) + " only",
			})
		}
	}
	if len(denied) > 0 {
		return &DeniedError{denied}
	}
	return nil
}

// policyFields are fields of the API by those of a Build, which package policy
// names.
var policyFields = map[string]string{
	"spec.runtimeClassName":                        "spec.sandbox",
	"spec.resources.limits[cpu]":                   "spec.resources.cpu_millis",
	"spec.resources.limits[memory]":                "spec.resources.memory_bytes",
	"spec.resources.limits[kiln.build/pids]":       "spec.resources.pids",
	"spec.resources.limits[ephemeral-storage]":     "spec.resources.disk_bytes",
	"spec.resources.limits[kiln.build/inodes]":     "spec.resources.inodes",
	"spec.resources.limits[kiln.build/open-files]": "spec.resources.open_files",
	"spec.resources.limits[kiln.build/log-bytes]":  "spec.resources.log_bytes",
	"spec.resources.limits[kiln.build/log-rate]":   "spec.resources.log_rate",
	"spec.resources.limits[kiln.build/shm]":        "spec.resources.shm_bytes",
	"spec.stepTimeout":                             "spec.resources.step_timeout",
}

// Share implements Policy.
func (p RulePolicy) Share(tenant string) (running, waiting int) {
	t := p(tenant)
	return t.MaxRunning, t.MaxQueued
}

func orNothing(patterns []string) string {
	if len(patterns) == 0 {
		return "no name"
	}
	return strings.Join(patterns, ", ")
}

// request is what a spec wants, in terms of policy.
func request(spec *agentv1.BuildSpec) policy.Request {
	r := policy.Request{
		Class: className(spec.GetSandbox()), Network: networkName(spec.GetNetwork()),
		Limits:  steplimits.Of(spec.GetResources()),
		Timeout: spec.GetTimeout().AsDuration(),
		Pull:    pulls(spec),
		Mounts:  mounts(spec),
	}
	if d := spec.GetDockerfile(); d != nil && d.GetBuildArgs()[syntaxArg] != "" {
		r.Frontends = []policy.Image{{Field: "spec.dockerfile.build_args[" + syntaxArg + "]", Name: policy.Frontend(d.GetBuildArgs()[syntaxArg])}}
	}
	for i, o := range spec.GetOutputs() {
		if image := o.GetRegistry().GetImage(); image != "" {
			r.Push = append(r.Push, policy.Image{Field: field("spec.outputs", i) + ".registry.image", Name: image})
		}
	}
	for i, c := range spec.GetCacheTo() {
		if ref := c.GetAttributes()["ref"]; ref != "" {
			r.Push = append(r.Push, policy.Image{Field: field("spec.cache_to", i) + ".attributes[ref]", Name: ref})
		}
	}
	return r
}

// pulls are the images that a spec is known to read. Those that a Dockerfile names
// are the engine's to check.
func pulls(spec *agentv1.BuildSpec) []policy.Image {
	var out []policy.Image
	add := func(field, name string) {
		if name != "" {
			out = append(out, policy.Image{Field: field, Name: name})
		}
	}
	for i, src := range spec.GetSource().GetImages() {
		add(field("spec.source.images", i)+".image", src.GetImage())
	}
	contexts := spec.GetSource().GetNamedContexts()
	for _, name := range slices.Sorted(maps.Keys(contexts)) {
		if image, ok := strings.CutPrefix(contexts[name], "docker-image://"); ok {
			add("spec.source.named_contexts["+name+"]", image)
		}
	}
	for i, step := range spec.GetSteps().GetSteps() {
		add(field("spec.steps.steps", i)+".image", step.GetImage())
	}
	add("spec.steps.image.base", spec.GetSteps().GetImage().GetBase())
	for i, c := range spec.GetCacheFrom() {
		add(field("spec.cache_from", i)+".attributes[ref]", c.GetAttributes()["ref"])
	}
	return out
}

// syntaxArg is the build argument that names a front end, as a syntax line does.
const syntaxArg = "BUILDKIT_SYNTAX"

// mounts are the types of mounts that the spec's own steps have. Those of a Dockerfile are
// checked when its steps run.
func mounts(spec *agentv1.BuildSpec) []policy.MountType {
	var out []policy.MountType
	for i, step := range spec.GetSteps().GetSteps() {
		at := field("spec.steps.steps", i)
		for j := range step.GetCaches() {
			out = append(out, policy.MountType{Field: field(at+".caches", j), Type: policy.MountCache})
		}
		for j, s := range step.GetSecrets() {
			if s.GetEnv() == "" || s.GetPath() != "" {
				out = append(out, policy.MountType{Field: field(at+".secrets", j), Type: policy.MountSecret})
			}
		}
	}
	return out
}

// completed returns a copy of spec with the tenant's defaults.
func completed(p Policy, tenant string, spec *agentv1.BuildSpec) *agentv1.BuildSpec {
	spec = proto.CloneOf(spec)
	p.Complete(tenant, spec)
	return spec
}
