// Package admission decides whether a Build may run as it asks to: which class of sandbox
// its RuntimeClass means, and whether every SandboxPolicy of its namespace allows it.
//
// It promises that the API server's question and the controller's are answered by the same
// code, that whatever cannot be read or understood is refused, and that a refusal names
// field and policy. It never changes a build and never starts one.
package admission

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/api/build/v1alpha1/policyset"
	"github.com/kiln-build/kiln/controller/inputs"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// Evaluator answers whether builds may run. Its methods may be called concurrently.
type Evaluator struct {
	// Reader reads Namespaces, SandboxPolicies and RuntimeClasses; a cache will do.
	Reader client.Reader
	// Handlers maps handlers of RuntimeClasses to classes of sandbox.
	Handlers map[string]string
	// DefaultClass is the class of builds that name none, where policy does not decide.
	DefaultClass string
}

// Refusals are all reasons against a build.
type Refusals []*policy.Denied

func (r Refusals) Error() string {
	all := make([]string, 0, len(r))
	for _, d := range r {
		all = append(all, d.Error())
	}
	return strings.Join(all, "; ")
}

// Evaluate returns what b asks for with every default filled in. The error is Refusals,
// *inputs.Missing for a RuntimeClass that does not exist, or *inputs.Invalid; any other
// error means that the question could not be answered.
func (e *Evaluator) Evaluate(ctx context.Context, b *v1alpha1.Build) (policy.Request, error) {
	rules, err := e.rules(ctx, b.Namespace)
	if err != nil {
		return policy.Request{}, err
	}
	req, err := e.request(ctx, b)
	if err != nil {
		return policy.Request{}, err
	}
	req = policy.Complete(rules, req)
	if req.Class == "" {
		req.Class = e.DefaultClass
	}
	if req.Network == "" {
		req.Network = policy.NetworkEgress
	}
	if denied := policy.Check(rules, req); len(denied) > 0 {
		return policy.Request{}, Refusals(denied)
	}
	return req, nil
}

func (e *Evaluator) rules(ctx context.Context, namespace string) ([]policy.Rules, error) {
	ns := &corev1.Namespace{}
	if err := e.Reader.Get(ctx, types.NamespacedName{Name: namespace}, ns); err != nil {
		return nil, fmt.Errorf("read Namespace %q: %w", namespace, err)
	}
	list := &v1alpha1.SandboxPolicyList{}
	if err := e.Reader.List(ctx, list); err != nil {
		return nil, fmt.Errorf("list SandboxPolicies: %w", err)
	}
	return policyset.For(list.Items, namespace, ns.Labels)
}

func (e *Evaluator) request(ctx context.Context, b *v1alpha1.Build) (policy.Request, error) {
	var req policy.Request
	class, err := e.class(ctx, b.Spec.RuntimeClassName)
	if err != nil {
		return req, err
	}
	req.Class = class
	if n := b.Spec.Network; n != nil {
		req.Network = strings.ToLower(string(*n))
	}
	if b.Spec.Resources != nil {
		req.Limits = policyset.Limits(b.Spec.Resources.Limits)
	}
	if b.Spec.Timeout != nil {
		req.Timeout = b.Spec.Timeout.Duration
	}
	if b.Spec.StepTimeout != nil {
		req.Limits.StepTimeout = b.Spec.StepTimeout.Duration
	}
	req.Pull, req.Push = images(&b.Spec)
	req.Frontends, req.Mounts = frontends(&b.Spec), mounts(&b.Spec)
	return req, nil
}

func (e *Evaluator) class(ctx context.Context, name *string) (string, error) {
	const field = "spec.runtimeClassName"
	if name == nil {
		return "", nil
	}
	rc := &nodev1.RuntimeClass{}
	err := e.Reader.Get(ctx, types.NamespacedName{Name: *name}, rc)
	switch {
	case apierrors.IsNotFound(err):
		return "", &inputs.Missing{Field: field, Object: fmt.Sprintf("RuntimeClass %q", *name)}
	case err != nil:
		return "", fmt.Errorf("read RuntimeClass %q: %w", *name, err)
	}
	class, ok := e.Handlers[rc.Handler]
	if !ok {
		return "", &inputs.Invalid{Field: field, Message: fmt.Sprintf("RuntimeClass %q has the handler %q, which is no sandbox for builds; handlers that are: %s",
			*name, rc.Handler, strings.Join(slices.Sorted(maps.Keys(e.Handlers)), ", "))}
	}
	return class, nil
}

// images returns the names that the spec says will be read and written. Those that a
// Dockerfile names are not among them: the agent checks them when they are read.
func images(spec *v1alpha1.BuildSpec) (pull, push []policy.Image) {
	if s := spec.Source; s != nil {
		for i, img := range s.Images {
			pull = append(pull, policy.Image{Field: fmt.Sprintf("spec.source.images[%d].image", i), Name: img.Image})
		}
		for _, name := range slices.Sorted(maps.Keys(s.NamedContexts)) {
			if ref, ok := strings.CutPrefix(s.NamedContexts[name], "docker-image://"); ok {
				pull = append(pull, policy.Image{Field: "spec.source.namedContexts[" + name + "]", Name: ref})
			}
		}
	}
	if s := spec.Strategy.Steps; s != nil {
		for i, step := range s.Steps {
			pull = append(pull, policy.Image{Field: fmt.Sprintf("spec.strategy.steps.steps[%d].image", i), Name: step.Image})
		}
		if s.Image != nil && s.Image.Base != "" {
			pull = append(pull, policy.Image{Field: "spec.strategy.steps.image.base", Name: s.Image.Base})
		}
	}
	if o := spec.Output; o != nil && (o.Push == nil || *o.Push) {
		push = append(push, policy.Image{Field: "spec.output.image", Name: o.Image})
		for i, name := range o.AdditionalImages {
			push = append(push, policy.Image{Field: fmt.Sprintf("spec.output.additionalImages[%d]", i), Name: name})
		}
	}
	if c := spec.Cache; c != nil {
		pull = append(pull, cacheImages("spec.cache.from", c.From)...)
		push = append(push, cacheImages("spec.cache.to", c.To)...)
	}
	return pull, push
}

func cacheImages(field string, refs []v1alpha1.CacheReference) []policy.Image {
	var out []policy.Image
	for i, c := range refs {
		if ref, ok := c.Attributes["ref"]; ok && c.Type == "registry" {
			out = append(out, policy.Image{Field: fmt.Sprintf("%s[%d].attributes[ref]", field, i), Name: ref})
		}
	}
	return out
}
