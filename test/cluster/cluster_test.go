package cluster

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

// testTimeout bounds a test that starts a cluster.
const testTimeout = 4 * time.Minute

// upVariable makes the test binary start the cluster that it names, and nothing
// else, for tests that kill it.
const upVariable = "KILN_TEST_CLUSTER_UP"

func TestMain(m *testing.M) {
	if dir := os.Getenv(upVariable); dir != "" {
		if _, err := Up(context.Background(), Config{Dir: dir, Log: os.Stdout}); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// bench is a running cluster with what tests do in it.
type bench struct {
	*Cluster
	ctx    context.Context
	client *kubernetes.Clientset
}

func TestCluster(t *testing.T) {
	ctx := testContext(t)
	dir := filepath.Join(t.TempDir(), "state")
	takeCensus(t, dir)
	c, err := Up(ctx, Config{Dir: dir})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Down(context.WithoutCancel(ctx))) })
	client, closeClient, err := c.client()
	require.NoError(t, err)
	t.Cleanup(closeClient)
	b := &bench{c, ctx, client}

	for _, step := range []struct {
		name string
		test func(*testing.T, *bench)
	}{
		{"nodes are ready", testNodes},
		{"a second start finds it running", testSecondUp},
		{"pods run on each node to completion", testPods},
		{"pods have user namespaces", testUserNamespace},
		{"pods see the host paths of their own node", testHostPaths},
		{"pods run images from the registry", testRegistry},
		{"services are reached by address and name", testService},
		{"pods reach the API server by its Service", testInCluster},
		{"runtime classes name the nodes' handlers", testRuntimeClasses},
		{"commands run in pods and machines", testExec},
		{"the API server comes back", testAPIServerFault},
		{"pods survive their containerd", testContainerdFault},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.test(t, b) }) {
			return
		}
	}
}

func testNodes(t *testing.T, b *bench) {
	nodes, err := b.client.CoreV1().Nodes().List(b.ctx, metav1.ListOptions{})
	require.NoError(t, err)
	var names []string
	for _, n := range nodes.Items {
		names = append(names, n.Name)
		require.NoError(t, nodeReady(&n))
		require.Equal(t, "v1.36.3", n.Status.NodeInfo.KubeletVersion)
	}
	require.Equal(t, []string{"node1", "node2"}, names)
	require.Equal(t, names, b.nodeNames())
	for _, n := range b.Nodes() {
		require.FileExists(t, n.Path("/var/lib/kubelet/cpu_manager_state"))
		_, err := os.Stat(n.ContainerdSocket())
		require.NoError(t, err)
	}
}

func testSecondUp(t *testing.T, b *bench) {
	_, err := Up(b.ctx, Config{Dir: b.Dir()})
	require.ErrorIs(t, err, ErrRunning)
	again, err := Open(b.Dir())
	require.NoError(t, err)
	require.Equal(t, b.Registry(), again.Registry())
	require.Equal(t, b.Control().Address(), again.Control().Address())
	require.NoError(t, again.WaitReady(b.ctx))
}

func testPods(t *testing.T, b *bench) {
	pods := b.podsOnAll("sh", "-c", "echo hello from $(hostname)")
	b.create(t, pods...)
	for _, pod := range pods {
		require.Equal(t, "hello from "+pod.Name+"\n", b.finish(t, pod))
	}
}

func testUserNamespace(t *testing.T, b *bench) {
	pod := b.pod(b.Nodes()[0], "cat", "/proc/self/uid_map")
	pod.Spec.HostUsers = new(bool)
	fields := strings.Fields(b.finish(t, pod))
	require.Len(t, fields, 3)
	require.Equal(t, "0", fields[0])
	require.NotEqual(t, "0", fields[1], "root of the Pod is root of the node")
}

func testHostPaths(t *testing.T, b *bench) {
	both := corev1.MountPropagationBidirectional
	pods := b.podsOnAll("sh", "-c", "test ! -e /host/owner && echo $NODE >/host/owner && mkdir /host/m && mount -t tmpfs m /host/m && echo $NODE >/host/m/owner && test -S /run/containerd/containerd.sock")
	for _, pod := range pods {
		ctr := &pod.Spec.Containers[0]
		ctr.Env = []corev1.EnvVar{{Name: "NODE", Value: pod.Spec.NodeName}}
		ctr.SecurityContext = &corev1.SecurityContext{Privileged: new(bool)}
		*ctr.SecurityContext.Privileged = true
		ctr.VolumeMounts = []corev1.VolumeMount{{Name: "kiln", MountPath: "/host", MountPropagation: &both}, {Name: "run", MountPath: "/run/containerd"}}
		pod.Spec.Volumes = []corev1.Volume{hostPath("kiln", "/var/lib/kiln"), hostPath("run", "/run/containerd")}
	}
	b.create(t, pods...)
	for _, pod := range pods {
		require.Empty(t, b.finish(t, pod))
	}
	for _, n := range b.Nodes() {
		for _, path := range []string{"/var/lib/kiln/owner", "/var/lib/kiln/m/owner"} {
			data, err := os.ReadFile(n.Path(path))
			require.NoError(t, err)
			require.Equal(t, n.Name()+"\n", string(data))
		}
	}
}

func hostPath(name, path string) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}
}

func testRegistry(t *testing.T, b *bench) {
	image, err := b.PushImage(b.ctx, "test/pulled:new", map[string]string{"/greeting": "testdata/greeting"},
		v1.Config{Cmd: []string{"cat", "/greeting"}})
	require.NoError(t, err)
	pods := []*corev1.Pod{b.pod(b.Nodes()[0]), b.pod(b.Nodes()[1])}
	pods[0].Spec.Containers[0].Image = image
	pods[1].Spec.Containers[0].Image = b.SecureRegistry() + "/test/pulled:new"
	b.create(t, pods...)
	for _, pod := range pods {
		require.Equal(t, "pulled\n", b.finish(t, pod))
	}
}

func testService(t *testing.T, b *bench) {
	server := b.pod(b.Nodes()[0], "sh", "-c", "echo served >/index.html && exec httpd -f -p 8080 -h /")
	server.Labels = map[string]string{"app": "server"}
	b.create(t, server)
	svc, err := b.client.CoreV1().Services("default").Create(b.ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "server"},
		Spec:       corev1.ServiceSpec{Selector: server.Labels, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)

	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		resp, err := client.Get("http://" + svc.Spec.ClusterIP)
		require.NoError(t, err)
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, "served\n", string(data))
	}, 20*time.Second, 100*time.Millisecond, "the caller does not reach the Service")
	pods := b.podsOnAll("wget", "-qO-", "http://server")
	b.create(t, pods...)
	for _, pod := range pods {
		require.Equal(t, "served\n", b.finish(t, pod), "from %s", pod.Spec.NodeName)
	}
}

func testInCluster(t *testing.T, b *bench) {
	pod := b.pod(b.Nodes()[1], "/programs/kubectl", "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}")
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "programs", MountPath: "/programs"}}
	pod.Spec.Volumes = []corev1.Volume{hostPath("programs", b.bin)}
	require.Equal(t, "system:serviceaccount:default:default", b.finish(t, pod))
}

func testRuntimeClasses(t *testing.T, b *bench) {
	for name, handler := range map[string]string{"gvisor": "runsc", "userns": "userns"} {
		_, err := b.client.NodeV1().RuntimeClasses().Create(b.ctx, &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	node, err := b.client.CoreV1().Nodes().Get(b.ctx, "node1", metav1.GetOptions{})
	require.NoError(t, err)
	var names []string
	for _, h := range node.Status.RuntimeHandlers {
		names = append(names, h.Name)
	}
	require.ElementsMatch(t, []string{"", "runc", "runsc", "userns"}, names)
	class := "userns"
	pod := b.pod(b.Nodes()[0], "echo", "ran")
	pod.Spec.RuntimeClassName = &class
	require.Equal(t, "ran\n", b.finish(t, pod))
}

func testExec(t *testing.T, b *bench) {
	pod := b.pod(b.Nodes()[1], "sleep", "1000")
	b.create(t, pod)
	b.wait(t, pod, corev1.PodRunning)
	out, err := b.Kubectl(b.ctx, "exec", pod.Name, "--", "hostname").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, pod.Name+"\n", string(out))

	require.NoError(t, b.Nodes()[0].Run(b.ctx, "extra", "sh", "-c", "echo more; exec sleep 1000"))
	require.Error(t, b.Nodes()[0].Run(b.ctx, "extra", "true"), "the name is taken")
	extra, err := b.Nodes()[0].Component("extra")
	require.NoError(t, err)
	require.EventuallyWithT(t, func(t *assert.CollectT) { require.Equal(t, "more", extra.logTail()) }, 5*time.Second, 20*time.Millisecond)

	for _, m := range b.machines {
		out, err := m.Command(b.ctx, "hostname").CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Equal(t, m.Name()+"\n", string(out))
	}
}

func testAPIServerFault(t *testing.T, b *bench) {
	api, err := b.Control().Component(APIServer)
	require.NoError(t, err)
	before, err := api.PID()
	require.NoError(t, err)
	require.NoError(t, api.Kill(b.ctx))
	_, err = api.PID()
	require.Error(t, err)
	require.ErrorContains(t, b.WaitReady(b.ctx), "control/kube-apiserver ended")
	require.NoError(t, api.Start(b.ctx))
	require.NoError(t, b.WaitReady(b.ctx))
	after, err := api.PID()
	require.NoError(t, err)
	require.NotEqual(t, before, after)
	require.Equal(t, "again\n", b.finish(t, b.pod(b.Nodes()[0], "echo", "again")))
}

func testContainerdFault(t *testing.T, b *bench) {
	n := b.Nodes()[0]
	pod := b.pod(n, "sh", "-c", "for i in 1 2 3 4; do echo $i; sleep 1; done")
	b.create(t, pod)
	b.wait(t, pod, corev1.PodRunning)
	k, err := n.Component(Containerd)
	require.NoError(t, err)
	require.NoError(t, k.Restart(b.ctx))
	require.Equal(t, "1\n2\n3\n4\n", b.finish(t, pod))
}
