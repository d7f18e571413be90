package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/test/cluster"
)

const (
	// upTimeout bounds the start of the cluster and the deployment.
	upTimeout = 8 * time.Minute
	// buildTimeout bounds one build.
	buildTimeout = 3 * time.Minute
	// requestTimeout is the API server's: short, so that an upload soon takes longer.
	requestTimeout = 20 * time.Second
	// namespace is where most builds of the tests are.
	namespace = "team-a"
	// restricted is a namespace with a policy.
	restricted = "restricted"
)

// installation is kiln on a cluster.
type installation struct {
	*cluster.Cluster
	bin string
	// address is the caller's in the network of machines.
	address netip.Addr
}

// clusterEnv names the state directory of a cluster that runs, with kiln deployed on
// it. The tests then use that and leave it; it must have no Builds.
const clusterEnv = "KILN_E2E_CLUSTER"

// install starts a cluster and deploys kiln on it. Both end with the test.
func install(t *testing.T) *installation {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	repo, err := filepath.Abs("../..")
	require.NoError(t, err)
	if dir := os.Getenv(clusterEnv); dir != "" {
		c, err := cluster.Open(dir)
		require.NoError(t, err)
		in := &installation{Cluster: c, bin: filepath.Join(repo, "bin"), address: callerAddress(t, c)}
		in.prepare(t)
		return in
	}
	// Unix sockets below it have short names.
	dir, err := os.MkdirTemp("/var/lib", "kiln-e2e-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	began := time.Now()
	c, err := cluster.Up(ctx, cluster.Config{Dir: filepath.Join(dir, "cluster"), RequestTimeout: requestTimeout})
	require.NoError(t, err, "run `make cluster-tools` first")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		require.NoError(t, c.Down(ctx))
	})
	t.Logf("the cluster is up after %s", time.Since(began).Round(time.Second))
	in := &installation{Cluster: c, bin: filepath.Join(repo, "bin"), address: callerAddress(t, c)}
	began = time.Now()
	cmd := exec.CommandContext(ctx, filepath.Join(repo, "deploy", "overlays", "test", "deploy.sh"), c.Dir())
	cmd.Env = append(os.Environ(), "KILN_ROOT="+imagesRoot(t))
	out, err := cmd.CombinedOutput()
	if err != nil {
		in.explain(t)
	}
	require.NoError(t, err, string(out))
	t.Logf("kiln is deployed after %s", time.Since(began).Round(time.Second))
	groups := kilnCgroups(t)
	t.Cleanup(func() { in.uninstall(t, groups) })
	in.prepare(t)
	return in
}

// uninstall removes kiln as the documentation says. No cgroup that it made is left on
// the nodes then but those that were there.
func (in *installation) uninstall(t *testing.T, before []string) {
	t.Helper()
	in.kubectl(t, "delete", "-k", filepath.Join("..", "..", "deploy", "overlays", "test"), "--timeout=50s")
	var left []string
	require.Eventually(t, func() bool {
		left = slices.DeleteFunc(kilnCgroups(t), func(g string) bool { return slices.Contains(before, g) })
		return len(left) == 0
	}, 20*time.Second, 100*time.Millisecond, "agents that have stopped left cgroups: %q", left)
}

// kilnCgroups lists the cgroups that agents made for steps.
func kilnCgroups(t *testing.T) []string {
	t.Helper()
	groups, err := filepath.Glob("/sys/fs/cgroup/*/kiln/*/")
	require.NoError(t, err)
	return groups
}

// prepare makes the namespaces of the tests, which end with them.
func (in *installation) prepare(t *testing.T) {
	t.Helper()
	for _, name := range []string{namespace, restricted} {
		in.kubectl(t, "create", "namespace", name)
	}
	in.kubectl(t, "label", "namespace", restricted, "tier=restricted")
	t.Cleanup(func() {
		if t.Failed() {
			in.explain(t)
		}
		in.kubectl(t, "delete", "namespace", namespace, restricted, "--timeout=50s")
	})
}

// imagesRoot is a state directory that outlives the test, so that kiln's own images
// are not made from nothing each time.
func imagesRoot(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	require.NoError(t, err)
	dir := filepath.Join(cache, "kiln", "e2e-images")
	require.NoError(t, os.MkdirAll(dir, 0o755))
	return dir
}

// callerAddress returns the address of the caller in the network of machines.
func callerAddress(t *testing.T, c *cluster.Cluster) netip.Addr {
	t.Helper()
	network, err := c.Control().Address().Prefix(24)
	require.NoError(t, err)
	addrs, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && network.Contains(p.Addr()) {
			return p.Addr()
		}
	}
	t.Fatalf("the caller has no address in %s", network)
	return netip.Addr{}
}

// explain logs what helps to understand a failure.
func (in *installation) explain(t *testing.T) {
	for _, args := range [][]string{
		{"get", "pods,builds", "-A", "-o", "wide"},
		{"get", "events", "-n", "kiln-system", "--sort-by=.lastTimestamp"},
		{"logs", "-n", "kiln-system", "deployment/kiln-controller", "--tail=60"},
		{"logs", "-n", "kiln-system", "daemonset/kiln-agent", "--tail=60"},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		out, _ := in.Kubectl(ctx, args...).CombinedOutput()
		cancel()
		t.Logf("kubectl %s\n%s", strings.Join(args, " "), out)
	}
}

// kubectl runs kubectl, which must succeed.
func (in *installation) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := in.tryKubectl("", args...)
	require.NoError(t, err, "kubectl %q: %s", args, out)
	return out
}

func (in *installation) tryKubectl(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := in.Kubectl(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// apply applies manifests, which the API server must accept.
func (in *installation) apply(t *testing.T, manifest string) {
	t.Helper()
	out, err := in.tryKubectl(manifest, "apply", "-f", "-")
	require.NoError(t, err, out)
}

// spec is a Build of the tests' namespace with this spec in YAML.
func manifest(name, spec string) string {
	return fmt.Sprintf("apiVersion: kiln.build/v1alpha1\nkind: Build\nmetadata: {name: %s, namespace: %s}\nspec:\n%s", name, namespace, spec)
}

// get returns a Build.
func (in *installation) get(t *testing.T, name string) *buildv1.Build {
	t.Helper()
	out := in.kubectl(t, "get", "build", name, "-n", namespace, "-o", "json")
	b := &buildv1.Build{}
	require.NoError(t, json.Unmarshal([]byte(out), b))
	return b
}

// ended waits for the end of a Build and returns it.
func (in *installation) ended(t *testing.T, name string) *buildv1.Build {
	t.Helper()
	var b *buildv1.Build
	require.Eventually(t, func() bool {
		b = in.get(t, name)
		return b.Ended()
	}, buildTimeout, 200*time.Millisecond, "build %s does not end", name)
	return b
}

// succeeds applies a Build and waits for its success.
func (in *installation) succeeds(t *testing.T, name, spec string) *buildv1.Build {
	t.Helper()
	in.apply(t, manifest(name, spec))
	b := in.ended(t, name)
	require.Equal(t, buildv1.PhaseSucceeded, b.Status.Phase, "%s: %s", name, explanation(b))
	return b
}

// fails applies a Build, waits for its failure and returns it.
func (in *installation) fails(t *testing.T, name, spec string) *buildv1.Build {
	t.Helper()
	in.apply(t, manifest(name, spec))
	b := in.ended(t, name)
	require.NotEqual(t, buildv1.PhaseSucceeded, b.Status.Phase, name)
	require.NotNil(t, b.Status.FailureDetails)
	return b
}

func explanation(b *buildv1.Build) string {
	data, _ := json.Marshal(b.Status)
	return string(data)
}

// kiln runs the kiln command against the cluster.
func (in *installation) kiln(args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(in.bin, "kiln"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+in.Kubeconfig())
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return strings.TrimSpace(out.String()), errOut.String(), err
}

// serve serves a directory over HTTPS at the caller's address in the cluster's
// network, and returns the URL.
func (in *installation) serve(t *testing.T, dir string) string {
	t.Helper()
	caCert, err := os.ReadFile(in.CAFile())
	require.NoError(t, err)
	caKey, err := os.ReadFile(filepath.Join(filepath.Dir(in.CAFile()), "ca.key"))
	require.NoError(t, err)
	pair := sign(t, caCert, caKey, &x509.Certificate{
		Subject: pkix.Name{CommonName: "files"}, IPAddresses: []net.IP{in.address.AsSlice()}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	l, err := tls.Listen("tcp", netip.AddrPortFrom(in.address, 0).String(), &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12})
	require.NoError(t, err)
	s := &http.Server{Handler: http.FileServer(http.Dir(dir)), ErrorLog: log.New(io.Discard, "", 0)}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return "https://" + l.Addr().String()
}

// pod runs an image as a Pod on a node, without pulling it, and returns its output.
func (in *installation) pod(t *testing.T, name, image, node string) string {
	t.Helper()
	in.apply(t, fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  nodeName: %s
  restartPolicy: Never
  automountServiceAccountToken: false
  containers:
  - {name: main, image: %q, imagePullPolicy: Never}
`, name, namespace, node, image))
	require.Eventually(t, func() bool {
		phase := in.kubectl(t, "get", "pod", name, "-n", namespace, "-o", "jsonpath={.status.phase}")
		require.NotEqual(t, "Failed", phase)
		return phase == "Succeeded"
	}, time.Minute, 200*time.Millisecond, "pod %s does not end: %s", name, in.describe(name))
	return in.kubectl(t, "logs", name, "-n", namespace)
}

func (in *installation) describe(pod string) string {
	out, _ := in.tryKubectl("", "describe", "pod", pod, "-n", namespace)
	return out
}
