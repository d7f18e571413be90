// Package clusterpolicy knows the cluster's SandboxPolicies, so that the agent holds a
// namespace's builds to them itself, whoever sends them.
//
// It promises to refuse while it does not know: before the first complete answer of the
// API server every tenant has a rule that denies everything. Afterwards the last that was
// known holds while the API server is away. It reads SandboxPolicies and the labels of
// Namespaces, and nothing else.
package clusterpolicy

import (
	"context"
	"errors"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/api/build/v1alpha1/policyset"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// Policies are the cluster's policies. Its methods may be called concurrently.
type Policies struct {
	policies, namespaces followed
}

// followed is a kind of object that is followed.
type followed struct {
	store      cache.Store
	controller cache.Controller
}

// New returns policies that know nothing until Run has read them. It has clients of its
// own for two kinds: the general one brings every kind of Kubernetes into memory.
func New(cfg *rest.Config) (*Policies, error) {
	p := &Policies{}
	var err error
	if p.policies, err = follow(cfg, "/apis", v1alpha1.GroupVersion, "sandboxpolicies", v1alpha1.AddToScheme, &v1alpha1.SandboxPolicy{}); err != nil {
		return nil, err
	}
	addNamespaces := func(s *runtime.Scheme) error {
		s.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Namespace{}, &corev1.NamespaceList{})
		metav1.AddToGroupVersion(s, corev1.SchemeGroupVersion)
		return nil
	}
	if p.namespaces, err = follow(cfg, "/api", corev1.SchemeGroupVersion, "namespaces", addNamespaces, &corev1.Namespace{}); err != nil {
		return nil, err
	}
	return p, nil
}

func follow(cfg *rest.Config, path string, gv schema.GroupVersion, resource string, add func(*runtime.Scheme) error, kind runtime.Object) (followed, error) {
	scheme := runtime.NewScheme()
	if err := add(scheme); err != nil {
		return followed{}, fmt.Errorf("register kinds: %w", err)
	}
	cfg = rest.CopyConfig(cfg)
	cfg.UserAgent, cfg.APIPath, cfg.GroupVersion = "kiln-agent", path, &gv
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return followed{}, fmt.Errorf("make client of the API server: %w", err)
	}
	var f followed
	f.store, f.controller = cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(client, resource, "", fields.Everything()), ObjectType: kind,
		Handler: cache.ResourceEventHandlerFuncs{}, Transform: strip,
	})
	return f, nil
}

// strip leaves of a Namespace only its name and labels.
func strip(o any) (any, error) {
	if ns, ok := o.(*corev1.Namespace); ok {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns.Name, Labels: ns.Labels, ResourceVersion: ns.ResourceVersion, UID: ns.UID}}, nil
	}
	return o, nil
}

// Run follows the policies until ctx ends.
func (p *Policies) Run(ctx context.Context) {
	var group sync.WaitGroup
	for _, f := range []followed{p.policies, p.namespaces} {
		group.Go(func() { f.controller.RunWithContext(ctx) })
	}
	group.Wait()
}

// Ready is nil once the policies are known.
func (p *Policies) Ready() error {
	if !p.policies.controller.HasSynced() || !p.namespaces.controller.HasSynced() {
		return errors.New("the cluster's SandboxPolicies have not been read yet")
	}
	return nil
}

// Rules returns what holds for a tenant, whose name is that of a namespace.
func (p *Policies) Rules(tenant string) []policy.Rules {
	rules, err := p.rules(tenant)
	if err != nil {
		return []policy.Rules{denyAll(err)}
	}
	return rules
}

func (p *Policies) rules(tenant string) ([]policy.Rules, error) {
	if err := p.Ready(); err != nil {
		return nil, err
	}
	var labels map[string]string
	if o, ok, err := p.namespaces.store.GetByKey(tenant); err != nil {
		return nil, err
	} else if ns, isNamespace := o.(*corev1.Namespace); ok && isNamespace {
		labels = ns.Labels
	}
	var all []v1alpha1.SandboxPolicy
	for _, o := range p.policies.store.List() {
		if sp, ok := o.(*v1alpha1.SandboxPolicy); ok {
			all = append(all, *sp)
		}
	}
	return policyset.For(all, tenant, labels)
}

// denyAll is a rule that no request satisfies: it allows one class of sandbox, which does
// not exist. Its name is what users see.
func denyAll(err error) policy.Rules {
	return policy.Rules{Name: "unknown: " + err.Error(), Classes: []string{"none"}}
}
