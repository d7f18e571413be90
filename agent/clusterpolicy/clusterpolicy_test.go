package clusterpolicy

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/testcluster"
	"github.com/kiln-build/kiln/sandbox/policy"
)

func TestEverythingIsDeniedUntilPoliciesAreKnown(t *testing.T) {
	p, err := New(&rest.Config{Host: "https://127.0.0.1:1"})
	require.NoError(t, err)
	for _, r := range []policy.Request{{}, {Class: policy.GVisor}, {Class: policy.Userns}, {Class: "none"}} {
		rules := p.Rules("default")
		require.NotEmpty(t, policy.Check(rules, policy.Complete(rules, r)), "%+v", r)
	}
}

func TestPoliciesOfTheCluster(t *testing.T) {
	c, err := testcluster.Start()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Stop()) })
	scheme := runtime.NewScheme()
	require.NoError(t, corev1.AddToScheme(scheme))
	require.NoError(t, v1alpha1.AddToScheme(scheme))
	api, err := client.New(c.Config, client.Options{Scheme: scheme})
	require.NoError(t, err)
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "restricted"}}
	require.NoError(t, api.Create(t.Context(), ns))

	p, err := New(c.Config)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.Run(ctx)
	}()
	require.Eventually(t, func() bool { return p.Ready() == nil }, 20*time.Second, 20*time.Millisecond)
	require.Empty(t, p.Rules("restricted"))

	class := v1alpha1.SandboxClass(policy.GVisor)
	require.NoError(t, api.Create(t.Context(), &v1alpha1.SandboxPolicy{ObjectMeta: metav1.ObjectMeta{Name: "tier"}, Spec: v1alpha1.SandboxPolicySpec{
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"tier": "restricted"}}, SandboxClasses: &v1alpha1.SandboxClassRules{Required: &class},
	}}))
	ns.Labels = map[string]string{"tier": "restricted"}
	require.NoError(t, api.Update(t.Context(), ns))
	require.Eventually(t, func() bool {
		r := p.Rules("restricted")
		return len(r) == 1 && r[0].RequiredClass == policy.GVisor
	}, 20*time.Second, 20*time.Millisecond)
	require.Empty(t, p.Rules("default"))
	require.Empty(t, p.Rules("not-a-namespace"))
	cancel()
	<-done
	require.Len(t, p.Rules("restricted"), 1, "what is known holds while the API server is away")
}
