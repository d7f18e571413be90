package controller

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/config"
)

// serveAPIServer lets the API server call the controller: the Service is a name for this
// machine, and the ports are those of cfg.
func serveAPIServer(t *testing.T, cfg *config.Controller) {
	t.Helper()
	ctx := t.Context()
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "kiln-system", Name: "kiln-controller"},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "localhost"}}
	if err := api.Create(ctx, svc); !apierrors.IsAlreadyExists(err) {
		require.NoError(t, err)
	}
	port := func(addr string) string { return addr[strings.LastIndex(addr, ":")+1:] }
	require.NoError(t, apply(ctx, "webhook.yaml", "port: 443", "port: "+port(cfg.Webhook.Address)))
	require.NoError(t, apply(ctx, "apiservice.yaml", "port: 444", "port: "+port(cfg.Subresources.Address)))
	t.Cleanup(func() {
		ctx := context.Background()
		for _, file := range [][2]string{{"admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration"}, {"apiregistration.k8s.io/v1", "APIService"}} {
			o := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: file[0], Kind: file[1]}}
			o.Name = map[string]string{"APIService": "v1alpha1.subresources.kiln.build", "ValidatingWebhookConfiguration": "kiln-controller"}[file[1]]
			_ = api.Delete(ctx, o)
		}
	})
}

// user is somebody with a role of deploy/base in a namespace.
func user(t *testing.T, name, ns, role string) *kubernetes.Clientset {
	t.Helper()
	require.NoError(t, api.Create(t.Context(), &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "test-"},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, Name: name}}}))
	cfg, err := cluster.User(name)
	require.NoError(t, err)
	set, err := kubernetes.NewForConfig(cfg)
	require.NoError(t, err)
	return set
}

const streams = "/apis/subresources.kiln.build/v1alpha1/namespaces/"

func logRequest(set *kubernetes.Clientset, b *v1alpha1.Build, query map[string]string) *rest.Request {
	r := set.RESTClient().Get().AbsPath(streams + b.Namespace + "/builds/" + b.Name + "/log")
	for k, v := range query {
		r = r.Param(k, v)
	}
	return r
}

// awaitAPIService waits until the API server serves the aggregated API.
func awaitAPIService(t *testing.T, set *kubernetes.Clientset) {
	t.Helper()
	var err error
	require.True(t, waitFor(30*time.Second, func() bool {
		_, err = set.RESTClient().Get().AbsPath("/apis/subresources.kiln.build/v1alpha1").DoRaw(t.Context())
		return err == nil
	}), "%v", err)
}

// events reads a log stream to its end.
func events(t *testing.T, body io.Reader) []map[string]any {
	t.Helper()
	var out []map[string]any
	for s := bufio.NewScanner(body); s.Scan(); {
		var e map[string]any
		require.NoError(t, json.Unmarshal(s.Bytes(), &e))
		out = append(out, e)
	}
	return out
}

func TestLogThroughTheAPIServer(t *testing.T) {
	cfg := testConfig(t)
	serveAPIServer(t, cfg)
	runController(t, cfg)
	startAgent(t, 1)
	ns := namespace(t, nil)
	alice, mallory := user(t, "alice", ns, "kiln-user"), user(t, "mallory", namespace(t, nil), "kiln-user")
	awaitAPIService(t, alice)
	b := create(t, newBuild(ns, "app", "ok"))

	t.Run("follows from the start, before the build has a node", func(t *testing.T) {
		body, err := logRequest(alice, b, map[string]string{"follow": "true"}).Stream(t.Context())
		require.NoError(t, err)
		defer func() { _ = body.Close() }()
		all := events(t, body)
		require.Contains(t, all[len(all)-1], "result")
		require.Equal(t, "BUILD_STATE_QUEUED", all[0]["status"].(map[string]any)["state"])
	})
	t.Run("goes on from an offset", func(t *testing.T) {
		body, err := logRequest(alice, b, map[string]string{"offset": "2"}).Stream(t.Context())
		require.NoError(t, err)
		defer func() { _ = body.Close() }()
		require.Equal(t, "2", events(t, body)[0]["offset"])
	})
	t.Run("is not for users of other namespaces", func(t *testing.T) {
		_, err := logRequest(mallory, b, nil).DoRaw(t.Context())
		require.True(t, apierrors.IsForbidden(err), "%v", err)
	})
	t.Run("of a build that does not exist", func(t *testing.T) {
		_, err := logRequest(alice, newBuild(ns, "none", ""), nil).DoRaw(t.Context())
		require.True(t, apierrors.IsNotFound(err), "%v", err)
	})
	t.Run("with a wrong offset", func(t *testing.T) {
		for _, offset := range []string{"-1", "x", "999"} {
			_, err := logRequest(alice, b, map[string]string{"offset": offset}).DoRaw(t.Context())
			require.True(t, apierrors.IsBadRequest(err), "%s: %v", offset, err)
		}
	})
	t.Run("refuses who is not the API server's proxy", func(t *testing.T) {
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		defer c.CloseIdleConnections()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+cfg.Subresources.Address+streams+ns+"/builds/app/log", nil)
		require.NoError(t, err)
		req.Header.Set("X-Remote-User", "system:admin")
		resp, err := c.Do(req)
		if err == nil {
			_ = resp.Body.Close()
		}
		require.ErrorContains(t, err, "certificate required")
	})
}

func TestUploadThroughTheAPIServer(t *testing.T) {
	cfg := testConfig(t)
	serveAPIServer(t, cfg)
	runController(t, cfg)
	startAgent(t, 1)
	ns := namespace(t, nil)
	alice, viewer := user(t, "alice", ns, "kiln-user"), user(t, "victor", ns, "kiln-viewer")
	awaitAPIService(t, alice)
	content := bytes.Repeat([]byte("kiln"), 1<<20)
	sum := sha256.Sum256(content)
	b := newBuild(ns, "app", "ok")
	b.Spec.Source = &v1alpha1.Source{Upload: &v1alpha1.UploadSource{Digest: "sha256:" + hex.EncodeToString(sum[:])}}
	create(t, b)
	await(t, b, v1alpha1.ReasonAwaitingUpload)
	put := func(set *kubernetes.Clientset, data []byte) error {
		_, err := set.RESTClient().Put().AbsPath(streams + ns + "/builds/app/upload").Body(data).DoRaw(t.Context())
		return err
	}
	require.True(t, apierrors.IsForbidden(put(viewer, content)))
	require.True(t, apierrors.IsBadRequest(put(alice, content[1:])), "another digest")
	require.NoError(t, put(alice, content))
	await(t, b, v1alpha1.ReasonSucceeded)
	require.True(t, apierrors.IsConflict(put(alice, content)), "it has ended")
}

func TestPolicyRefusesAtAdmissionAndBehindIt(t *testing.T) {
	first := runController(t, testConfig(t))
	twin := startAgent(t, 1)
	gvisor := v1alpha1.SandboxClass("gvisor")
	policy := &v1alpha1.SandboxPolicy{ObjectMeta: metav1.ObjectMeta{Name: "restricted"}, Spec: v1alpha1.SandboxPolicySpec{
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"tier": "restricted"}},
		SandboxClasses:    &v1alpha1.SandboxClassRules{Required: &gvisor},
		Registries:        &v1alpha1.RegistryRules{Push: []string{"registry.example.com/team"}},
		MaxTimeout:        &metav1.Duration{Duration: time.Hour},
	}}
	require.NoError(t, api.Create(t.Context(), policy))
	t.Cleanup(func() { _ = api.Delete(context.Background(), policy) })
	ns := namespace(t, map[string]string{"tier": "restricted"})
	asking := func(name string) *v1alpha1.Build {
		b := newBuild(ns, name, "ok")
		b.Spec.RuntimeClassName = new("userns")
		return b
	}
	// Without the webhook, as when somebody took it away.
	got := await(t, create(t, asking("bypass")), v1alpha1.ReasonDenied)
	require.Equal(t, `spec.runtimeClassName: denied by SandboxPolicy "restricted", rule sandboxClasses.required: sandbox must be gvisor, not userns`, condition(got).Message)
	require.Zero(t, twin.Started())

	first.stop()
	cfg := testConfig(t)
	serveAPIServer(t, cfg)
	runController(t, cfg)
	var err error
	require.True(t, waitFor(30*time.Second, func() bool {
		// Until the webhook answers nothing is let in.
		err = api.Create(t.Context(), asking("refused"))
		return err != nil && apierrors.IsForbidden(err)
	}), "%v", err)
	require.ErrorContains(t, err, `denied by SandboxPolicy "restricted", rule sandboxClasses.required: sandbox must be gvisor`)
	for name, c := range map[string]struct {
		change func(*v1alpha1.Build)
		want   string
	}{
		"push elsewhere":      {func(b *v1alpha1.Build) { b.Spec.Output.Image = "evil.example.com/x:1" }, "spec.output.image: denied"},
		"timeout too long":    {func(b *v1alpha1.Build) { b.Spec.Timeout = &metav1.Duration{Duration: 2 * time.Hour} }, "spec.timeout: denied"},
		"no sandbox":          {func(b *v1alpha1.Build) { b.Spec.RuntimeClassName = new("kata") }, `RuntimeClass "kata" has the handler "kata", which is no sandbox for builds`},
		"malformed image":     {func(b *v1alpha1.Build) { b.Spec.Output.Image = "registry.example.com/team/APP" }, "spec.output.image: image name"},
		"secret as build arg": {func(b *v1alpha1.Build) { b.Spec.BuildArgs[0] = secretArg() }, "spec.buildArgs[0].valueFrom.secretKeyRef"},
	} {
		b := newBuild(ns, "refused", "ok")
		c.change(b)
		require.ErrorContains(t, api.Create(t.Context(), b), c.want, name)
	}
	allowed := create(t, newBuild(ns, "allowed", "ok"))
	require.Equal(t, "gvisor", await(t, allowed, v1alpha1.ReasonSucceeded).Status.Sandbox)
	build, _ := twin.Build(string(allowed.UID))
	require.Equal(t, time.Hour, build.Spec.Timeout.AsDuration(), "the policy's timeout is that of builds that name none")
}

func secretArg() v1alpha1.Variable {
	return v1alpha1.Variable{Name: "TOKEN", ValueFrom: &v1alpha1.VariableSource{SecretKeyRef: &v1alpha1.KeyReference{Name: "s", Key: "k"}}}
}

func TestRolesOfPeople(t *testing.T) {
	runController(t, testConfig(t))
	ns := namespace(t, nil)
	for _, c := range []struct {
		role  string
		make_ bool
	}{{"kiln-user", true}, {"kiln-viewer", false}} {
		require.NoError(t, api.Create(t.Context(), &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "test-"},
			RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: c.role},
			Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, Name: c.role}}}))
		cfg, err := cluster.User(c.role)
		require.NoError(t, err)
		mine, err := client.New(cfg, client.Options{Scheme: Scheme()})
		require.NoError(t, err)
		require.NoError(t, mine.List(t.Context(), &v1alpha1.BuildList{}, client.InNamespace(ns)))
		err = mine.Create(t.Context(), newBuild(ns, fmt.Sprintf("by-%s", c.role), "ok"))
		require.Equal(t, c.make_, err == nil, "%v", err)
		require.True(t, apierrors.IsForbidden(mine.Create(t.Context(), &v1alpha1.SandboxPolicy{ObjectMeta: metav1.ObjectMeta{Name: "mine"}})), "policies are the administrators'")
	}
}
