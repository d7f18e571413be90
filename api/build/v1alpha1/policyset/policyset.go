// Package policyset selects the SandboxPolicies that hold for a namespace and turns
// them into rules of package policy.
//
// It promises that a policy which cannot be understood holds everybody off: it becomes
// rules that refuse, never rules that say nothing.
package policyset

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// For returns the rules that hold for a namespace with the given labels, in the order of
// the policies' names.
func For(policies []v1alpha1.SandboxPolicy, namespace string, nsLabels map[string]string) ([]policy.Rules, error) {
	var out []policy.Rules
	for i := range policies {
		p := &policies[i]
		selected, err := selects(&p.Spec, namespace, nsLabels)
		if err != nil {
			return nil, fmt.Errorf("read SandboxPolicy %q: %w", p.Name, err)
		}
		if selected {
			out = append(out, Rules(p))
		}
	}
	slices.SortFunc(out, func(a, b policy.Rules) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func selects(spec *v1alpha1.SandboxPolicySpec, namespace string, nsLabels map[string]string) (bool, error) {
	if len(spec.Namespaces) == 0 && spec.NamespaceSelector == nil {
		return true, nil
	}
	if slices.Contains(spec.Namespaces, namespace) {
		return true, nil
	}
	if spec.NamespaceSelector == nil {
		return false, nil
	}
	sel, err := metav1.LabelSelectorAsSelector(spec.NamespaceSelector)
	if err != nil {
		return false, fmt.Errorf("spec.namespaceSelector: %w", err)
	}
	return sel.Matches(labels.Set(nsLabels)), nil
}

// Rules returns what p says.
func Rules(p *v1alpha1.SandboxPolicy) policy.Rules {
	r := policy.Rules{Name: p.Name}
	if c := p.Spec.SandboxClasses; c != nil {
		for _, class := range c.Allowed {
			r.Classes = append(r.Classes, string(class))
		}
		r.RequiredClass, r.DefaultClass = text(c.Required), text(c.Default)
	}
	if n := p.Spec.Network; n != nil {
		for _, mode := range n.Allowed {
			r.Networks = append(r.Networks, strings.ToLower(string(mode)))
		}
		r.DefaultNetwork = strings.ToLower(text(n.Default))
		if d := n.Destinations; d != nil {
			r.Destinations = policy.Destinations{Allow: d.Allow, Deny: d.Deny}
		}
	}
	if reg := p.Spec.Registries; reg != nil {
		r.Pull, r.Push = reg.Pull, reg.Push
	}
	if p.Spec.MaxResources != nil {
		r.Max = Limits(p.Spec.MaxResources.Limits)
	}
	if t := p.Spec.MaxTimeout; t != nil {
		r.MaxTimeout = t.Duration
	}
	if t := p.Spec.MaxStepTimeout; t != nil {
		r.Max.StepTimeout = t.Duration
	}
	if f := p.Spec.Frontends; f != nil {
		r.Frontends = f.Allowed
	}
	if m := p.Spec.Mounts; m != nil {
		for _, t := range m.Allowed {
			r.Mounts = append(r.Mounts, strings.ToLower(string(t)))
		}
	}
	return r
}

// Limits returns limits in the units of package policy.
func Limits(list corev1.ResourceList) policy.Limits {
	var l policy.Limits
	if q, ok := list[corev1.ResourceCPU]; ok {
		l.CPUMillis = q.MilliValue()
	}
	for name, to := range map[corev1.ResourceName]*int64{
		corev1.ResourceMemory: &l.MemoryBytes, corev1.ResourceEphemeralStorage: &l.DiskBytes,
		v1alpha1.ResourcePIDs: &l.PIDs, v1alpha1.ResourceInodes: &l.Inodes, v1alpha1.ResourceOpenFiles: &l.OpenFiles,
		v1alpha1.ResourceLogBytes: &l.LogBytes, v1alpha1.ResourceLogRate: &l.LogRate, v1alpha1.ResourceShm: &l.ShmBytes,
	} {
		if q, ok := list[name]; ok {
			*to = q.Value()
		}
	}
	return l
}

func text[T ~string](p *T) string {
	if p == nil {
		return ""
	}
	return string(*p)
}
