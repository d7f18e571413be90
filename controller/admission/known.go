package admission

import (
	"fmt"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// syntaxArg is the build argument that names a front end, as a syntax line does.
const syntaxArg = "BUILDKIT_SYNTAX"

// frontends returns what the spec says will read its Dockerfile. What a syntax line names is
// not among it, nor the value of a ConfigMap: the agent asks again when it knows.
func frontends(spec *v1alpha1.BuildSpec) []policy.Image {
	if spec.Strategy.Steps != nil {
		return nil
	}
	for i, arg := range spec.BuildArgs {
		if arg.Name != syntaxArg {
			continue
		}
		if arg.ValueFrom != nil {
			return nil
		}
		return []policy.Image{{Field: fmt.Sprintf("spec.buildArgs[%d].value", i), Name: policy.Frontend(arg.Value)}}
	}
	return nil
}

// mounts returns the types of mounts that the spec's own steps have. Those of a Dockerfile
// are the agent's to check.
func mounts(spec *v1alpha1.BuildSpec) []policy.MountType {
	var out []policy.MountType
	if spec.Strategy.Steps == nil {
		return nil
	}
	for i, s := range spec.Strategy.Steps.Steps {
		at := fmt.Sprintf("spec.strategy.steps.steps[%d]", i)
		for j := range s.Caches {
			out = append(out, policy.MountType{Field: fmt.Sprintf("%s.caches[%d]", at, j), Type: policy.MountCache})
		}
		for j, sec := range s.Secrets {
			if sec.Env == "" || sec.Path != "" {
				out = append(out, policy.MountType{Field: fmt.Sprintf("%s.secrets[%d]", at, j), Type: policy.MountSecret})
			}
		}
	}
	return out
}
