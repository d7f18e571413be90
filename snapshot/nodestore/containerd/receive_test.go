package containerd

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

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

// provider serves other content than the store for some blobs.
type provider struct {
	content.Provider
	replace map[digest.Digest]func() (content.ReaderAt, error)
}

func (p provider) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if f, ok := p.replace[desc.Digest]; ok {
		return f()
	}
	return p.Provider.ReaderAt(ctx, desc)
}

type wrongBytes struct{ size int64 }

func (w wrongBytes) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), w.size-off)
	clear(p[:n])
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}
func (w wrongBytes) Size() int64 { return w.size }
func (wrongBytes) Close() error  { return nil }

func TestReceiveRefusals(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	good := b.busybox("good")
	_, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "good:1"), Target: good.target, Content: b.store})
	require.NoError(t, err)
	before := d.holdings()

	img := b.busybox("bad")
	serve := func(blob ocispecs.Descriptor, f func() (content.ReaderAt, error)) content.Provider {
		return provider{Provider: b.store, replace: map[digest.Digest]func() (content.ReaderAt, error){blob.Digest: f}}
	}
	missing := func() (content.ReaderAt, error) { return nil, errdefs.ErrNotFound }
	broken := func() (content.ReaderAt, error) { return nil, errors.New("disk error") }
	wrong := func(size int64) func() (content.ReaderAt, error) {
		return func() (content.ReaderAt, error) { return wrongBytes{size}, nil }
	}
	manifest := func(m ocispecs.Manifest) ocispecs.Descriptor {
		m.Versioned, m.MediaType = specs.Versioned{SchemaVersion: 2}, ocispecs.MediaTypeImageManifest
		return b.putJSON(m.MediaType, m)
	}
	swapped := slices.Clone(img.layers)
	slices.Reverse(swapped)
	shrunk := slices.Clone(img.layers)
	shrunk[1].Size--
	known := slices.Clone(good.layers)
	known[1].Size++
	traversal := slices.Clone(img.layers)
	traversal[1].Digest = "sha256:../../../../etc/passwd"
	negative := slices.Clone(img.layers)
	negative[1].Size = -1
	notImage := img.layers[0]
	notImage.MediaType = ocispecs.MediaTypeImageManifest
	huge := b.put(ocispecs.MediaTypeImageManifest, make([]byte, maxDocument+1))
	text := b.put(ocispecs.MediaTypeImageLayerGzip, []byte("no archive"))
	name := parsed(t, "bad:1")

	for attack, tc := range map[string]struct {
		image nodestore.Image
		names string
		is    func(error) bool
	}{
		"no name":                    {nodestore.Image{Target: img.target, Content: b.store}, "name", errdefs.IsInvalidArgument},
		"short name":                 {nodestore.Image{Name: shortName("bad:1"), Target: img.target, Content: b.store}, "bad:1", errdefs.IsInvalidArgument},
		"name with a line break":     {nodestore.Image{Name: shortName("bad\n:1"), Target: img.target, Content: b.store}, "bad", errdefs.IsInvalidArgument},
		"name of an image ID":        {nodestore.Image{Name: shortName(good.config.Digest.String()), Target: img.target, Content: b.store}, "", errdefs.IsInvalidArgument},
		"digest of another image":    {nodestore.Image{Name: parsed(t, "bad@"+good.target.Digest.String()), Target: img.target, Content: b.store}, img.target.Digest.String(), errdefs.IsInvalidArgument},
		"target without digest":      {nodestore.Image{Name: name, Target: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest}, Content: b.store}, "bad", errdefs.IsInvalidArgument},
		"target is a layer":          {nodestore.Image{Name: name, Target: img.layers[0], Content: b.store}, ocispecs.MediaTypeImageLayerGzip, errdefs.IsInvalidArgument},
		"layer called a manifest":    {nodestore.Image{Name: name, Target: notImage, Content: b.store}, notImage.Digest.String(), nil},
		"manifest of many megabytes": {nodestore.Image{Name: name, Target: huge, Content: b.store}, huge.Digest.String(), errdefs.IsInvalidArgument},
		"missing index":              {nodestore.Image{Name: name, Target: img.target, Content: serve(img.target, missing)}, img.target.Digest.String(), errdefs.IsNotFound},
		"missing manifest":           {nodestore.Image{Name: name, Target: img.target, Content: serve(img.manifest, missing)}, img.manifest.Digest.String(), errdefs.IsNotFound},
		"missing configuration":      {nodestore.Image{Name: name, Target: img.target, Content: serve(img.config, missing)}, img.config.Digest.String(), errdefs.IsNotFound},
		"missing layer":              {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], missing)}, img.layers[1].Digest.String(), errdefs.IsNotFound},
		"unreadable layer":           {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], broken)}, img.layers[1].Digest.String(), nil},
		"layer of other bytes":       {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], wrong(img.layers[1].Size))}, img.layers[1].Digest.String(), nil},
		"layer of another size":      {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], wrong(img.layers[1].Size+1))}, img.layers[1].Digest.String(), errdefs.IsInvalidArgument},
		"size that lies":             {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: shrunk}), Content: b.store}, img.layers[1].Digest.String(), errdefs.IsInvalidArgument},
		"size of a known blob lies":  {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: good.config, Layers: known}), Content: b.store}, good.layers[1].Digest.String(), errdefs.IsInvalidArgument},
		"negative size":              {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: negative}), Content: b.store}, "-1", errdefs.IsInvalidArgument},
		"digest that is a path":      {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: traversal}), Content: b.store}, "etc/passwd", errdefs.IsInvalidArgument},
		"layers in another order":    {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: swapped}), Content: b.store}, "unpack", nil},
		"too few layers":             {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: img.layers[:1]}), Content: b.store}, "unpack", nil},
		"layer that is no archive":   {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: []ocispecs.Descriptor{img.layers[0], text}}), Content: b.store}, "unpack", nil},
		"index of other platforms": {nodestore.Image{Name: name, Content: b.store, Target: b.putJSON(ocispecs.MediaTypeImageIndex, ocispecs.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageIndex,
			Manifests: []ocispecs.Descriptor{{MediaType: ocispecs.MediaTypeImageManifest, Digest: img.manifest.Digest, Size: img.manifest.Size, Platform: &ocispecs.Platform{OS: "plan9", Architecture: "mips"}}},
		})}, "", errdefs.IsNotFound},
	} {
		t.Run(attack, func(t *testing.T) {
			_, err := n.Receive(t.Context(), tc.image)
			require.Error(t, err)
			require.ErrorContains(t, err, tc.names)
			if tc.is != nil {
				require.True(t, tc.is(err), err)
			}
			require.Equal(t, strings.Join(before, "\n"), strings.Join(d.holdings(), "\n"))
			require.Nil(t, d.status("bad:1"))
		})
	}

	_, err = n.Receive(t.Context(), nodestore.Image{Name: name, Target: img.target, Content: b.store})
	require.NoError(t, err, "the next image is received")
	require.Equal(t, img.config.Digest.String(), d.status("bad:1").GetId())
}

// shortName is a name that did not come from ParseName.
type shortName string

func (s shortName) String() string { return string(s) }
func (s shortName) Name() string   { return string(s) }

func TestCancelledReceiveLeavesNothing(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	before := d.holdings()
	img := b.busybox("app")
	for _, at := range []ocispecs.Descriptor{img.target, img.config, img.layers[0], img.layers[1]} {
		ctx, cancel := context.WithCancel(t.Context())
		from := provider{Provider: b.store, replace: map[digest.Digest]func() (content.ReaderAt, error){at.Digest: func() (content.ReaderAt, error) {
			cancel()
			return b.store.ReaderAt(context.Background(), at)
		}}}
		_, err := n.Receive(ctx, nodestore.Image{Name: parsed(t, "app"), Target: img.target, Content: from})
		require.ErrorContains(t, err, "cancel")
		d.requireHoldings(before)
		cancel()
	}
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

func TestOwnerIsChecked(t *testing.T) {
	for _, owner := range []string{"a b", "a\"", "é", strings.Repeat("a", 64), "-a", "a,b"} {
		_, err := New(t.Context(), Config{Owner: owner, Socket: "/nowhere"})
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", owner, err)
	}
}
