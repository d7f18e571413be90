package translate

import (
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/inputs"
)

func dockerfile(b *v1alpha1.Build, in *inputs.Inputs) *agentv1.DockerfileStrategy {
	d := b.Spec.Strategy.Dockerfile
	if d == nil {
		d = &v1alpha1.DockerfileStrategy{}
	}
	args, _ := variables(b.Spec.BuildArgs, in)
	return &agentv1.DockerfileStrategy{Path: d.Path, Inline: d.Inline, Target: d.Target, Labels: d.Labels, ExtraHosts: d.ExtraHosts, BuildArgs: args}
}

func steps(b *v1alpha1.Build, in *inputs.Inputs) *agentv1.StepsStrategy {
	s := b.Spec.Strategy.Steps
	env, everyStep := variables(b.Spec.Env, in)
	out := &agentv1.StepsStrategy{Env: env}
	for i := range s.Steps {
		out.Steps = append(out.Steps, step(&s.Steps[i], in, everyStep))
	}
	if img := s.Image; img != nil {
		base := img.Base
		if base == "scratch" {
			base = ""
		}
		out.Image = &agentv1.StepsImage{Base: base, Env: img.Env, Entrypoint: img.Entrypoint, Cmd: img.Cmd, WorkingDir: img.WorkingDir, User: img.User, Labels: img.Labels}
		for _, c := range img.Copies {
			out.Image.Copies = append(out.Image.Copies, &agentv1.WorkspaceCopy{Source: c.Source, Destination: c.Destination, Chown: c.Chown})
		}
	}
	return out
}

func step(s *v1alpha1.Step, in *inputs.Inputs, everyStep []*agentv1.StepSecret) *agentv1.BuilderStep {
	env, secretEnv := variables(s.Env, in)
	out := &agentv1.BuilderStep{Name: s.Name, Image: s.Image, Command: s.Command, Args: s.Args, Env: env, WorkingDir: s.WorkingDir, User: s.User}
	own := map[string]bool{}
	for _, v := range s.Env {
		own[v.Name] = true
	}
	for _, sec := range everyStep {
		if !own[sec.Env] { // A step's own variable counts.
			out.Secrets = append(out.Secrets, sec)
		}
	}
	out.Secrets = append(out.Secrets, secretEnv...)
	for _, sec := range s.Secrets {
		out.Secrets = append(out.Secrets, &agentv1.StepSecret{Id: sec.ID, Path: sec.Path, Env: sec.Env})
	}
	for _, c := range s.Caches {
		out.Caches = append(out.Caches, &agentv1.StepCache{Id: c.ID, Path: c.Path})
	}
	if s.Timeout != nil {
		out.Timeout = durationpb.New(s.Timeout.Duration)
	}
	return out
}

// variables returns plain values, and those of Secrets as secrets of a step.
func variables(list []v1alpha1.Variable, in *inputs.Inputs) (map[string]string, []*agentv1.StepSecret) {
	if len(list) == 0 {
		return nil, nil
	}
	values := make(map[string]string, len(list))
	var secrets []*agentv1.StepSecret
	for _, v := range list {
		switch {
		case v.ValueFrom != nil && v.ValueFrom.SecretKeyRef != nil:
			secrets = append(secrets, &agentv1.StepSecret{Id: inputs.SecretID(*v.ValueFrom.SecretKeyRef), Env: v.Name})
		case v.ValueFrom != nil && v.ValueFrom.ConfigMapKeyRef != nil:
			values[v.Name] = in.Values[*v.ValueFrom.ConfigMapKeyRef]
		default:
			values[v.Name] = v.Value
		}
	}
	return values, secrets
}
