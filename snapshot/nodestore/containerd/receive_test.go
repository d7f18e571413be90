package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/stretchr/testify/require"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kiln-build/kiln/snapshot"
	"github.com/kiln-build/kiln/snapshot/nodestore"
)

func parsed(t *testing.T, name string) reference.Named {
	t.Helper()
	ref, err := nodestore.ParseName(name)
	require.NoError(t, err)
	return ref
}

// status returns what the kubelet finds by name.
func (d *daemon) status(name string) *runtimev1.Image {
	d.t.Helper()
	resp, err := d.images.ImageStatus(d.t.Context(), &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: name}})
	require.NoError(d.t, err)
	return resp.GetImage()
}

func TestKubeletSeesWhatWasReceived(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	img := b.busybox("hello")
	n := d.node("test")
	started := time.Now()
	id, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "app:1"), Target: img.target, Content: b.store})
	require.NoError(t, err)
	t.Logf("received in %s", time.Since(started))
	require.Equal(t, img.config.Digest, id)
	for _, name := range []string{"app:1", "docker.io/library/app:1", "app@" + img.target.Digest.String(), id.String()} {
		got := d.status(name)
		require.NotNil(t, got, name)
		require.Equal(t, id.String(), got.GetId(), name)
	}
	require.Equal(t, []string{"docker.io/library/app:1"}, d.status("app:1").GetRepoTags())
	leases, err := d.client.LeasesService().List(t.Context())
	require.NoError(t, err)
	require.Empty(t, leases)

	before := d.holdings()
	d.collect()
	require.Equal(t, before, d.holdings(), "what was received stays")
	for _, desc := range img.blobs() {
		_, err := d.client.ContentStore().Info(t.Context(), desc.Digest)
		require.NoError(t, err, desc.Digest)
	}
	again, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "app:1"), Target: img.target, Content: b.store})
	require.NoError(t, err)
	require.Equal(t, id, again)
	require.Equal(t, before, d.holdings())

	// It is there as soon as it has been received, every time.
	for i := range 20 {
		small := b.small(fmt.Sprint(i))
		id, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "small"), Target: small, Content: b.store})
		require.NoError(t, err)
		require.Equal(t, id.String(), d.status("small").GetId())
	}

	// A restarted containerd finds it too.
	d.stop()
	d.start()
	require.Equal(t, id.String(), d.status("app:1").GetId())
	_, err = n.Info(t.Context())
	require.NoError(t, err, "the node connects again")
}

// TestPodRunsWhatWasReceived runs a container as the kubelet does for a Pod with
// imagePullPolicy Never: there is no registry and no network.
func TestPodRunsWhatWasReceived(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	pause, app := b.busybox("busybox", "sleep", "1000"), b.busybox("busybox", "sh", "/bin/hello")
	_, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, pauseImage), Target: pause.target, Content: b.store})
	require.NoError(t, err)
	_, err = n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "team/app:1"), Target: app.target, Content: b.store})
	require.NoError(t, err)

	ctx := t.Context()
	logs := t.TempDir()
	sandbox := &runtimev1.PodSandboxConfig{
		Metadata:     &runtimev1.PodSandboxMetadata{Name: "pod", Uid: "1", Namespace: "default"},
		LogDirectory: logs,
		Linux: &runtimev1.LinuxPodSandboxConfig{
			CgroupParent:    "/kiln-nodestore-test",
			SecurityContext: &runtimev1.LinuxSandboxSecurityContext{NamespaceOptions: &runtimev1.NamespaceOption{Network: runtimev1.NamespaceMode_NODE}},
		},
	}
	t.Cleanup(removeTestCgroups)
	pod, err := d.runtime.RunPodSandbox(ctx, &runtimev1.RunPodSandboxRequest{Config: sandbox})
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx := context.Background()
		_, err := d.runtime.StopPodSandbox(ctx, &runtimev1.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId})
		require.NoError(t, err)
		_, err = d.runtime.RemovePodSandbox(ctx, &runtimev1.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})
		require.NoError(t, err)
	})
	container, err := d.runtime.CreateContainer(ctx, &runtimev1.CreateContainerRequest{
		PodSandboxId:  pod.PodSandboxId,
		SandboxConfig: sandbox,
		Config: &runtimev1.ContainerConfig{
			Metadata: &runtimev1.ContainerMetadata{Name: "app"},
			Image:    &runtimev1.ImageSpec{Image: "team/app:1"},
			LogPath:  "app.log",
			Linux:    &runtimev1.LinuxContainerConfig{},
		},
	})
	require.NoError(t, err)
	_, err = d.runtime.StartContainer(ctx, &runtimev1.StartContainerRequest{ContainerId: container.ContainerId})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		status, err := d.runtime.ContainerStatus(ctx, &runtimev1.ContainerStatusRequest{ContainerId: container.ContainerId})
		require.NoError(t, err)
		return status.GetStatus().GetState() == runtimev1.ContainerState_CONTAINER_EXITED
	}, 30*time.Second, 50*time.Millisecond)
	log, err := os.ReadFile(filepath.Join(logs, "app.log"))
	require.NoError(t, err)
	require.Contains(t, string(log), "hello from the node")
}

// removeTestCgroups removes the empty parents that runc leaves for Pods.
func removeTestCgroups() {
	for _, pattern := range []string{"/sys/fs/cgroup/*/kiln-nodestore-test", "/sys/fs/cgroup/kiln-nodestore-test"} {
		dirs, _ := filepath.Glob(pattern)
		for _, dir := range dirs {
			_ = os.Remove(dir)
		}
	}
}

// TestContentIsReadInItsOwnNamespace receives straight from a build store.
func TestContentIsReadInItsOwnNamespace(t *testing.T) {
	d := startDaemon(t, "")
	store, err := snapshot.Open(t.Context(), t.TempDir())
	require.NoError(t, err)
	defer store.Close()
	ctx := namespaces.WithNamespace(t.Context(), snapshot.Namespace)
	b := &builder{t: t, ctx: ctx, store: store.DB.ContentStore()}
	img := b.busybox("app")
	id, err := d.node("test").Receive(ctx, nodestore.Image{Name: parsed(t, "app"), Target: img.target, Content: b.store})
	require.NoError(t, err)
	require.Equal(t, id.String(), d.status("app").GetId())
}

func TestNameMovesToTheReceivedImage(t *testing.T) {
	d, r, b := startDaemon(t, ""), startRegistry(t), newBuilder(t)
	old, img := b.busybox("old"), b.busybox("new")
	name := r.addr + "/app:1"
	b.push(name, old)
	d.pull(name)
	n := d.node("test")
	_, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, name), Target: img.target, Content: b.store})
	require.NoError(t, err)
	require.Equal(t, img.config.Digest.String(), d.status(name).GetId())
	require.NotNil(t, d.status(old.config.Digest.String()), "the other image stays until the kubelet collects it")
	require.Equal(t, old.config.Digest.String(), d.status(r.addr+"/app@"+old.manifest.Digest.String()).GetId())
}

func TestPinnedImageIsNotReplaced(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	pause := b.busybox("pause")
	_, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, pauseImage), Target: pause.target, Content: b.store})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		img, err := d.client.ImageService().Get(t.Context(), pauseImage)
		return err == nil && img.Labels[labelPinned] == pinned
	}, 10*time.Second, 10*time.Millisecond)
	before := d.holdings()
	_, err = n.Receive(t.Context(), nodestore.Image{Name: parsed(t, pauseImage), Target: b.busybox("evil").target, Content: b.store})
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, pauseImage)
	d.requireHoldings(before)
}

// requireHoldings fails when containerd has something else than before.
func (d *daemon) requireHoldings(before []string) {
	d.t.Helper()
	require.Equal(d.t, strings.Join(before, "\n"), strings.Join(d.holdings(), "\n"))
}

func TestFailedNamingRestoresNames(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	old, img := b.busybox("old"), b.busybox("new")
	_, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "app"), Target: old.target, Content: b.store})
	require.NoError(t, err)
	before := d.holdings()

	// The name with the digest is taken by a pinned image.
	taken := images.Image{Name: "docker.io/library/app@" + img.target.Digest.String(), Target: old.target, Labels: map[string]string{labelManaged: managed, labelPinned: pinned}}
	_, err = d.client.ImageService().Create(t.Context(), taken)
	require.NoError(t, err)
	_, err = n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "app"), Target: img.target, Content: b.store})
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.NoError(t, d.client.ImageService().Delete(t.Context(), taken.Name))
	d.requireHoldings(before)
	require.Equal(t, old.config.Digest.String(), d.status("app").GetId())

	// A name that has moved goes back.
	undo, err := n.setName(t.Context(), "docker.io/library/app:latest", img.target)
	require.NoError(t, err)
	require.NoError(t, undo(t.Context()))
	d.requireHoldings(before)
	// Unless someone else has moved it on.
	undo, err = n.setName(t.Context(), "docker.io/library/app:latest", img.target)
	require.NoError(t, err)
	third := b.busybox("third")
	_, err = n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "app"), Target: third.target, Content: b.store})
	require.NoError(t, err)
	require.NoError(t, undo(t.Context()))
	require.Equal(t, third.config.Digest.String(), d.status("app").GetId())
}

func TestConcurrentReceivesOfOneName(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	var all []image
	for range 4 {
		all = append(all, b.busybox("app"))
	}
	errs := make(chan error, len(all))
	for _, img := range all {
		go func() {
			_, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "app"), Target: img.target, Content: b.store})
			errs <- err
		}()
	}
	for range all {
		require.NoError(t, <-errs)
	}
	last := d.status("app").GetId()
	require.True(t, slices.ContainsFunc(all, func(i image) bool { return i.config.Digest.String() == last }))
}

func TestDaemonGone(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	info, err := n.Info(t.Context())
	require.NoError(t, err)
	require.Equal(t, "containerd", info.Runtime)
	require.NotEmpty(t, info.Version)
	require.Equal(t, d.socket, info.Socket)
	require.Equal(t, "overlayfs", info.Snapshotter)
	require.False(t, info.DiscardsBlobs)
	d.stop()

	img := b.busybox("app")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for what, call := range map[string]func() error{
		"info":  func() error { _, err := n.Info(ctx); return err },
		"probe": func() error { _, err := n.Probe(ctx, img.config.Digest); return err },
		"lend":  func() error { _, err := n.Lend(ctx, named(t, "app")); return err },
		"receive": func() error {
			_, err := n.Receive(ctx, nodestore.Image{Name: parsed(t, "app"), Target: img.target, Content: b.store})
			return err
		},
		"new": func() error { _, err := New(ctx, Config{Socket: d.socket}); return err },
		"no socket": func() error {
			_, err := New(ctx, Config{Socket: filepath.Join(d.dir, "none.sock")})
			require.ErrorContains(t, err, "none.sock")
			return errors.Join(err, errors.New(d.socket))
		},
	} {
		err := call()
		require.Error(t, err, what)
		require.True(t, errdefs.IsUnavailable(err), "%s: %v", what, err)
		require.ErrorContains(t, err, d.socket, what)
	}
	require.NoError(t, ctx.Err(), "the errors come at once")
}

func TestDaemonWithoutCRI(t *testing.T) {
	d := startDaemon(t, "")
	d.stop()
	path := filepath.Join(d.dir, "config.toml")
	config, err := os.ReadFile(path)
	require.NoError(t, err)
	config = []byte(strings.Replace(string(config), "disabled_plugins = [", `disabled_plugins = ["io.containerd.grpc.v1.cri", `, 1))
	require.NoError(t, os.WriteFile(path, config, 0o600))
	d.launch()
	require.Eventually(t, func() bool {
		_, err := d.client.Version(t.Context())
		return err == nil
	}, 30*time.Second, 20*time.Millisecond)
	_, err = New(t.Context(), Config{Socket: d.socket})
	require.True(t, errdefs.IsNotImplemented(err), err)
	require.ErrorContains(t, err, "enable its CRI plugin")
}

func TestOwnerIsChecked(t *testing.T) {
	for _, owner := range []string{"a b", "a\"", "é", strings.Repeat("a", 64), "-a", "a,b"} {
		_, err := New(t.Context(), Config{Owner: owner, Socket: "/nowhere"})
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", owner, err)
	}
}
