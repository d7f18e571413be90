package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/agenttwin"
	"github.com/kiln-build/kiln/controller/config"
	"github.com/kiln-build/kiln/controller/testcluster"
)

// agentPort is where the twins listen, each on a loopback address of its own.
const agentPort = 17420

var (
	cluster *testcluster.Cluster
	api     client.Client
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if cluster, err = testcluster.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = cluster.Stop() }()
		if api, err = client.New(cluster.Config, client.Options{Scheme: Scheme()}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if err := prepare(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// prepare makes what every test needs.
func prepare(ctx context.Context) error {
	objects := []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kiln-system"}},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "gvisor"}, Handler: "runsc"},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "userns"}, Handler: "kiln-userns"},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "kata"}, Handler: "kata"},
	}
	for _, o := range objects {
		if err := api.Create(ctx, o); err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	for _, file := range []string{"rbac-users.yaml", "rbac-controller.yaml", "rbac-agent.yaml"} {
		if err := apply(ctx, file, "", ""); err != nil {
			return err
		}
	}
	return nil
}

// apply applies a file of deploy/base with a string replaced.
func apply(ctx context.Context, file, old, replacement string) error {
	data, err := os.ReadFile(filepath.Join(testcluster.Root(), "deploy", "base", file))
	if err != nil {
		return err
	}
	if old != "" {
		data = []byte(strings.ReplaceAll(string(data), old, replacement))
	}
	for _, doc := range strings.Split(string(data), "\n---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		switch o.GetKind() {
		case "ServiceAccount", "Role", "RoleBinding":
			o.SetNamespace("kiln-system")
		}
		if err := api.Apply(ctx, client.ApplyConfigurationFromUnstructured(o), client.FieldOwner("test"), client.ForceOwnership); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	return nil
}

// testConfig is a configuration with short times that listens on free ports.
func testConfig(t *testing.T) *config.Controller {
	cfg := config.Default()
	cfg.Agents.Port = agentPort
	cfg.Metrics.Address, cfg.Health.Address = "0", "0"
	cfg.Webhook.Address, cfg.Subresources.Address = freeAddress(t), freeAddress(t)
	cfg.Builds.MissingInputGrace.Duration = 3 * time.Second
	cfg.Builds.NodeLossGrace.Duration = 3 * time.Second
	cfg.Builds.RetryInterval.Duration = 300 * time.Millisecond
	cfg.Builds.StatusInterval.Duration = 100 * time.Millisecond
	cfg.Builds.SweepInterval.Duration = 500 * time.Millisecond
	cfg.LeaderElection.LeaseDuration.Duration = 4 * time.Second
	cfg.LeaderElection.RenewDeadline.Duration = 3 * time.Second
	cfg.LeaderElection.RetryPeriod.Duration = 500 * time.Millisecond
	require.NoError(t, cfg.Complete())
	return cfg
}

func freeAddress(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	return l.Addr().String()
}

// running is a controller that runs.
type running struct {
	stop func()
}

// runController runs a controller until the test ends or stop is called.
//
// It has the rights that deploy/base gives it, and no other.
func runController(t *testing.T, cfg *config.Controller) *running {
	t.Helper()
	restConfig, err := cluster.User("system:serviceaccount:kiln-system:kiln-controller", "system:serviceaccounts", "system:serviceaccounts:kiln-system")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	level := slog.LevelError
	if os.Getenv("KILN_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	c, err := New(ctx, cfg, restConfig, log, prometheus.NewRegistry())
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stopped := false
	r := &running{stop: func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Logf("controller ended: %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("the controller does not end")
		}
	}}
	t.Cleanup(r.stop)
	return r
}

// startAgent starts a twin on a node of its own, with its Pod. A controller has made the
// certificates.
func startAgent(t *testing.T, number int) *agenttwin.Twin {
	t.Helper()
	ctx := t.Context()
	node, ip := fmt.Sprintf("node-%d", number), fmt.Sprintf("127.0.77.%d", number)
	twin := agenttwin.New(node, agentTLS(t))
	require.NoError(t, twin.Serve(fmt.Sprintf("%s:%d", ip, agentPort)))
	t.Cleanup(twin.Kill)
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node, Labels: map[string]string{"kubernetes.io/hostname": node}}}
	require.NoError(t, api.Create(ctx, n))
	// The API server taints new nodes; kubelet and the node controller would clear it.
	n.Spec.Taints = nil
	require.NoError(t, api.Update(ctx, n))
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	require.NoError(t, api.Status().Update(ctx, n))
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "kiln-agent-" + node, Namespace: "kiln-system", Labels: map[string]string{"app.kubernetes.io/name": "kiln-agent"}},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "agent", Image: "kiln-agent"}}}}
	require.NoError(t, api.Create(ctx, pod))
	setPodReady(t, pod, ip, corev1.ConditionTrue)
	t.Cleanup(func() {
		ctx := context.Background()
		_ = api.Delete(ctx, pod, client.GracePeriodSeconds(0))
		_ = api.Delete(ctx, n)
	})
	return twin
}

func setPodReady(t *testing.T, pod *corev1.Pod, ip string, ready corev1.ConditionStatus) {
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}}
	require.NoError(t, api.Status().Update(t.Context(), pod))
}

// agentTLS is what the agent's Pod mounts, with the controller as the only client.
func agentTLS(t *testing.T) *tls.Config {
	s := &corev1.Secret{}
	require.NoError(t, api.Get(t.Context(), types.NamespacedName{Namespace: "kiln-system", Name: "kiln-agent-tls"}, s))
	cert, err := tls.X509KeyPair(s.Data["tls.crt"], s.Data["tls.key"])
	require.NoError(t, err)
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(s.Data["ca.crt"]))
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		VerifyConnection: func(c tls.ConnectionState) error {
			if cn := c.PeerCertificates[0].Subject.CommonName; cn != "kiln-controller" {
				return fmt.Errorf("client %q is not the controller", cn)
			}
			return nil
		}}
}

// namespace makes a namespace for one test.
func namespace(t *testing.T, labels map[string]string) string {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-", Labels: labels}}
	require.NoError(t, api.Create(t.Context(), ns))
	return ns.Name
}

// newBuild is a small Build; play is what the twin does with it.
func newBuild(ns, name, play string) *v1alpha1.Build {
	return &v1alpha1.Build{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: v1alpha1.BuildSpec{
		Strategy:  v1alpha1.Strategy{Dockerfile: &v1alpha1.DockerfileStrategy{Inline: "FROM scratch\nRUN play\n"}},
		BuildArgs: []v1alpha1.Variable{{Name: "PLAY", Value: play}},
		Output:    &v1alpha1.Output{Image: "registry.example.com/team/app:1"},
	}}
}

// create makes a Build.
func create(t *testing.T, b *v1alpha1.Build) *v1alpha1.Build {
	t.Helper()
	require.NoError(t, api.Create(t.Context(), b))
	return b
}

func get(t *testing.T, b *v1alpha1.Build) *v1alpha1.Build {
	t.Helper()
	out := &v1alpha1.Build{}
	require.NoError(t, api.Get(t.Context(), client.ObjectKeyFromObject(b), out))
	return out
}

func condition(b *v1alpha1.Build) metav1.Condition {
	if c := meta.FindStatusCondition(b.Status.Conditions, v1alpha1.ConditionSucceeded); c != nil {
		return *c
	}
	return metav1.Condition{}
}

// await waits until a Build has a reason.
func await(t *testing.T, b *v1alpha1.Build, reason string) *v1alpha1.Build {
	t.Helper()
	var last *v1alpha1.Build
	ok := waitFor(30*time.Second, func() bool {
		last = get(t, b)
		return condition(last).Reason == reason
	})
	if !ok {
		t.Fatalf("the build does not become %s; its condition is %+v", reason, condition(last))
	}
	return last
}

const waitLong, waitShort = 20 * time.Second, 50 * time.Millisecond

// waitFor waits until f is true.
func waitFor(most time.Duration, f func() bool) bool {
	for end := time.Now().Add(most); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if f() {
			return true
		}
	}
	return f()
}

func secretExists(t *testing.T, name string) bool {
	return api.Get(t.Context(), types.NamespacedName{Namespace: "kiln-system", Name: name}, &corev1.Secret{}) == nil
}
