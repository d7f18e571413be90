package admission

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// FuzzHandle asks about Builds as people write them. Nothing that cannot be read, or that
// policy forbids, is let in.
func FuzzHandle(f *testing.F) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, nodev1.AddToScheme, v1alpha1.AddToScheme} {
		require.NoError(f, add(scheme))
	}
	rules := &v1alpha1.SandboxPolicy{ObjectMeta: metav1.ObjectMeta{Name: "all"}}
	require.NoError(f, json.Unmarshal([]byte(`{"network":{"allowed":["None"]}}`), &rules.Spec))
	reader := fake.NewClientBuilder().WithScheme(scheme).WithObjects(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}}, rules).Build()
	w := NewWebhook(&Evaluator{Reader: reader, Handlers: map[string]string{"gvisor": "gvisor"}, DefaultClass: "gvisor"}, scheme)
	for _, s := range []string{
		`{}`, `null`, `[]`, `{"kind":"Build","apiVersion":"kiln.build/v1alpha1","metadata":{"name":"a"},"spec":{"source":{"git":{"url":"https://x/y"}}}}`,
		`{"spec":{"network":"Egress"}}`, `{"spec":{"resources":{"limits":{"memory":"1e99"}},"timeout":"-1s","platforms":["a/b/../c"]}}`,
		`{"spec":{"strategy":{"steps":{"steps":[{"name":"a","image":"b"}]}},"output":{"image":"a@b:c"},"runtimeClassName":"none"}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, object []byte) {
		got := w.Handle(t.Context(), admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{
			Operation: admissionv1.Create, Namespace: "ns", Object: runtime.RawExtension{Raw: object},
		}})
		if !got.Allowed {
			require.NotNil(t, got.Result)
			return
		}
		b := &v1alpha1.Build{}
		require.NoError(t, json.Unmarshal(object, b))
		if b.Spec.Network != nil {
			require.EqualValues(t, "None", *b.Spec.Network)
		}
	})
}
