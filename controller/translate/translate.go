// Package translate turns a Build into what an agent is asked to build.
//
// It promises to be pure, and to leave nothing out: a field of the Build that it cannot
// express is an error that names the field. It puts no secret into the spec.
package translate

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/distribution/reference"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/inputs"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// Labels of every build that the controller starts.
const (
	LabelNamespace = "kiln.build/namespace"
	LabelName      = "kiln.build/name"
	LabelUID       = "kiln.build/uid"
)

// Classes maps classes of sandbox to the agent's names.
var Classes = map[string]agentv1.SandboxClass{
	policy.GVisor: agentv1.SandboxClass_SANDBOX_CLASS_GVISOR,
	policy.Userns: agentv1.SandboxClass_SANDBOX_CLASS_USERNS,
}

var networks = map[string]agentv1.NetworkMode{
	policy.NetworkNone:   agentv1.NetworkMode_NETWORK_MODE_NONE,
	policy.NetworkEgress: agentv1.NetworkMode_NETWORK_MODE_EGRESS,
}

// Validate checks what the API server's schema cannot, without any other object.
func Validate(b *v1alpha1.Build) error {
	for _, img := range imageNames(&b.Spec) {
		if img.Name == "scratch" && img.Field == "spec.strategy.steps.image.base" {
			continue
		}
		if _, err := reference.ParseNormalizedNamed(img.Name); err != nil {
			return &inputs.Invalid{Field: img.Field, Message: fmt.Sprintf("image name %q: %v", img.Name, err)}
		}
	}
	seen := map[string]bool{}
	for i, s := range b.Spec.Secrets {
		if len(s.ID) >= 5 && s.ID[:5] == "kiln." {
			return &inputs.Invalid{Field: fmt.Sprintf("spec.secrets[%d].id", i), Message: `must not start with "kiln."`}
		}
		seen[s.ID] = true
	}
	for i, v := range b.Spec.BuildArgs {
		if v.ValueFrom != nil && v.ValueFrom.SecretKeyRef != nil {
			return &inputs.Invalid{Field: fmt.Sprintf("spec.buildArgs[%d].valueFrom.secretKeyRef", i), Message: "a build argument shows in the image's history; use spec.secrets and RUN --mount=type=secret"}
		}
	}
	if s := b.Spec.Strategy.Steps; s != nil {
		for i, step := range s.Steps {
			for j, sec := range step.Secrets {
				if !seen[sec.ID] {
					return &inputs.Invalid{Field: fmt.Sprintf("spec.strategy.steps.steps[%d].secrets[%d].id", i, j), Message: fmt.Sprintf("spec.secrets has no secret %q", sec.ID)}
				}
			}
		}
	}
	for _, d := range durations(b) {
		if d.value < time.Second {
			return &inputs.Invalid{Field: d.field, Message: "must be at least 1s"}
		}
	}
	return nil
}

type namedDuration struct {
	field string
	value time.Duration
}

func durations(b *v1alpha1.Build) []namedDuration {
	var out []namedDuration
	if t := b.Spec.Timeout; t != nil {
		out = append(out, namedDuration{"spec.timeout", t.Duration})
	}
	if t := b.Spec.StepTimeout; t != nil {
		out = append(out, namedDuration{"spec.stepTimeout", t.Duration})
	}
	if s := b.Spec.Strategy.Steps; s != nil {
		for i, step := range s.Steps {
			if step.Timeout != nil {
				out = append(out, namedDuration{fmt.Sprintf("spec.strategy.steps.steps[%d].timeout", i), step.Timeout.Duration})
			}
		}
	}
	return out
}

func imageNames(spec *v1alpha1.BuildSpec) []policy.Image {
	var out []policy.Image
	if s := spec.Source; s != nil {
		for i, img := range s.Images {
			out = append(out, policy.Image{Field: fmt.Sprintf("spec.source.images[%d].image", i), Name: img.Image})
		}
	}
	if s := spec.Strategy.Steps; s != nil {
		for i, step := range s.Steps {
			out = append(out, policy.Image{Field: fmt.Sprintf("spec.strategy.steps.steps[%d].image", i), Name: step.Image})
		}
		if s.Image != nil && s.Image.Base != "" {
			out = append(out, policy.Image{Field: "spec.strategy.steps.image.base", Name: s.Image.Base})
		}
	}
	if o := spec.Output; o != nil {
		out = append(out, policy.Image{Field: "spec.output.image", Name: o.Image})
		for i, name := range o.AdditionalImages {
			out = append(out, policy.Image{Field: fmt.Sprintf("spec.output.additionalImages[%d]", i), Name: name})
		}
	}
	return out
}

// Spec returns the agent's spec of b with the inputs that were resolved and the request
// that policy completed. b has passed Validate.
func Spec(b *v1alpha1.Build, in *inputs.Inputs, req policy.Request) (*agentv1.BuildSpec, error) {
	class, ok := Classes[req.Class]
	if !ok {
		return nil, &inputs.Invalid{Field: "spec.runtimeClassName", Message: fmt.Sprintf("sandbox %q is unknown", req.Class)}
	}
	network, ok := networks[req.Network]
	if !ok {
		return nil, &inputs.Invalid{Field: "spec.network", Message: fmt.Sprintf("network %q is unknown", req.Network)}
	}
	s := &agentv1.BuildSpec{
		Source: source(b, in), Sandbox: class, Network: network,
		Resources: resources(req.Limits),
		Outputs:   outputs(b.Spec.Output), Platforms: b.Spec.Platforms, CacheScope: cacheScope(&b.Spec),
		Attestations: b.Spec.Attestations, NoCache: b.Spec.NoCache, Pull: b.Spec.Pull, Destinations: b.Spec.Destinations,
		Labels: map[string]string{LabelNamespace: b.Namespace, LabelName: b.Name, LabelUID: string(b.UID)},
	}
	if req.Timeout > 0 {
		s.Timeout = durationpb.New(req.Timeout)
	}
	if b.Spec.SourceDateEpoch != nil {
		s.SourceDateEpoch = *b.Spec.SourceDateEpoch
	}
	if c := b.Spec.Cache; c != nil {
		s.CacheFrom, s.CacheTo = caches(c.From), caches(c.To)
	}
	for _, id := range slices.Sorted(maps.Keys(in.Credentials.GetSecrets())) {
		s.Secrets = append(s.Secrets, &agentv1.SecretRef{Id: id})
	}
	if b.Spec.Strategy.Steps != nil {
		s.Strategy = &agentv1.BuildSpec_Steps{Steps: steps(b, in)}
	} else {
		s.Strategy = &agentv1.BuildSpec_Dockerfile{Dockerfile: dockerfile(b, in)}
	}
	return s, nil
}

func resources(l policy.Limits) *agentv1.Resources {
	r := &agentv1.Resources{
		CpuMillis: l.CPUMillis, MemoryBytes: l.MemoryBytes, Pids: l.PIDs, DiskBytes: l.DiskBytes, Inodes: l.Inodes,
		OpenFiles: l.OpenFiles, LogBytes: l.LogBytes, LogRate: l.LogRate, ShmBytes: l.ShmBytes,
	}
	if l.StepTimeout > 0 {
		r.StepTimeout = durationpb.New(l.StepTimeout)
	}
	return r
}

func source(b *v1alpha1.Build, in *inputs.Inputs) *agentv1.Source {
	src := b.Spec.Source
	if src == nil {
		return nil
	}
	out := &agentv1.Source{NamedContexts: src.NamedContexts, ContextDir: src.ContextDir}
	switch {
	case src.Git != nil:
		git := &agentv1.GitSource{Url: src.Git.URL, Revision: src.Git.Revision}
		if src.Git.SecretRef != nil {
			git.Credential = inputs.GitCredential
		}
		out.From = &agentv1.Source_Git{Git: git}
	case src.HTTP != nil:
		out.From = &agentv1.Source_Http{Http: &agentv1.HTTPSource{Url: src.HTTP.URL, Digest: src.HTTP.Digest}}
	case src.Upload != nil:
		out.From = &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: src.Upload.Digest}}
	case len(src.Inline) > 0 || len(in.Files) > 0:
		out.From = &agentv1.Source_Inline{Inline: &agentv1.InlineSource{Files: inlineFiles(src.Inline, in.Files)}}
	}
	for _, img := range src.Images {
		is := &agentv1.ImageSource{Image: img.Image}
		for _, p := range img.Paths {
			is.Paths = append(is.Paths, &agentv1.ImagePath{SourcePath: p.SourcePath, DestinationDir: p.DestinationDir})
		}
		out.Images = append(out.Images, is)
	}
	return out
}

// inlineFiles puts the files of ConfigMaps over those of the spec; of two with one path
// the later counts.
func inlineFiles(inline []v1alpha1.InlineFile, more []*agentv1.InlineFile) []*agentv1.InlineFile {
	var all []*agentv1.InlineFile
	at := map[string]int{}
	add := func(f *agentv1.InlineFile) {
		if i, ok := at[f.Path]; ok {
			all[i] = f
			return
		}
		at[f.Path] = len(all)
		all = append(all, f)
	}
	for _, f := range inline {
		file := &agentv1.InlineFile{Path: f.Path, Content: []byte(f.Content)}
		if len(f.BinaryContent) > 0 {
			file.Content = f.BinaryContent
		}
		if f.Mode != nil {
			file.Mode = uint32(*f.Mode)
		}
		add(file)
	}
	for _, f := range more {
		add(f)
	}
	return all
}

func outputs(o *v1alpha1.Output) []*agentv1.Output {
	if o == nil {
		return nil
	}
	var out []*agentv1.Output
	for _, name := range append([]string{o.Image}, o.AdditionalImages...) {
		if o.Push == nil || *o.Push {
			out = append(out, &agentv1.Output{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{
				Image: name, Insecure: o.Insecure, Compression: o.Compression, ForceCompression: o.ForceCompression, Annotations: o.Annotations,
			}}})
		}
		if o.Node {
			out = append(out, &agentv1.Output{To: &agentv1.Output_Node{Node: &agentv1.NodeOutput{Image: name}}})
		}
	}
	return out
}

func caches(refs []v1alpha1.CacheReference) []*agentv1.CacheRef {
	var out []*agentv1.CacheRef
	for _, c := range refs {
		out = append(out, &agentv1.CacheRef{Type: c.Type, Attributes: c.Attributes})
	}
	return out
}

// cacheScope says which builds are expected to share steps.
func cacheScope(spec *v1alpha1.BuildSpec) string {
	switch s := spec.Source; {
	case spec.Cache != nil && spec.Cache.Scope != "":
		return spec.Cache.Scope
	case s != nil && s.Git != nil:
		return "git:" + s.Git.URL + "#" + s.ContextDir
	case spec.Output != nil:
		if named, err := reference.ParseNormalizedNamed(spec.Output.Image); err == nil {
			return "image:" + named.Name()
		}
	}
	return ""
}
