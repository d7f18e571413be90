package cluster

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// busyboxPath is Debian's static busybox, which is all that the images hold.
const busyboxPath = "/bin/busybox"

// pushImages makes the cluster's own images and pushes them to the registry,
// for which it waits.
func (c *Cluster) pushImages(ctx context.Context) error {
	for image, config := range map[string]v1.Config{
		"busybox": {Cmd: []string{"/bin/sh"}},
		"pause":   {Entrypoint: []string{"/bin/sh", "-c", `trap "exit 0" TERM; while :; do sleep 86400 & wait $!; done`}},
	} {
		if _, err := c.PushImage(ctx, "kiln/"+image+":1", nil, config); err != nil {
			return err
		}
	}
	return nil
}

// PushImage makes an image and pushes it to the cluster's registry under a
// repository and tag, such as "kiln/agent:test". The image has busybox with all its
// applets in /bin, and copies of the caller's files: the keys are paths in the
// image, the values those of the caller. An empty PATH is set to /bin. It returns
// the image's full name.
func (c *Cluster) PushImage(ctx context.Context, image string, files map[string]string, config v1.Config) (string, error) {
	ref, err := name.NewTag(c.registry+"/"+image, name.Insecure)
	if err != nil {
		return "", fmt.Errorf("name image %s: %w", image, err)
	}
	img, err := makeImage(ctx, files, config)
	if err != nil {
		return "", fmt.Errorf("make image %s: %w", image, err)
	}
	transport := remote.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	defer transport.CloseIdleConnections()
	err = c.retry(ctx, func() error {
		return remote.Write(ref, img, remote.WithContext(ctx), remote.WithTransport(transport))
	})
	if err != nil {
		return "", fmt.Errorf("push image %s: %w", image, err)
	}
	return ref.String(), nil
}

func makeImage(ctx context.Context, files map[string]string, config v1.Config) (v1.Image, error) {
	layers := make([]v1.Layer, 0, 2)
	layer, err := busyboxLayer(ctx)
	if err != nil {
		return nil, err
	}
	layers = append(layers, layer)
	if len(files) > 0 {
		if layer, err = filesLayer(files); err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", runtime.GOARCH, config
	if !slices.ContainsFunc(config.Env, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
		file.Config.Env = append(slices.Clone(config.Env), "PATH=/bin")
	}
	return mutate.ConfigFile(img, file)
}

// layerWriter makes a layer of files, and keeps the first error.
type layerWriter struct {
	buf bytes.Buffer
	tar *tar.Writer
	err error
}

func newLayerWriter() *layerWriter {
	w := new(layerWriter)
	w.tar = tar.NewWriter(&w.buf)
	return w
}

func (w *layerWriter) add(h tar.Header, content []byte) {
	if w.err != nil {
		return
	}
	h.Size = int64(len(content))
	if w.err = w.tar.WriteHeader(&h); w.err == nil {
		_, w.err = w.tar.Write(content)
	}
}

func (w *layerWriter) layer() (v1.Layer, error) {
	if err := errors.Join(w.err, w.tar.Close()); err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(w.buf.Bytes())), nil
	}, tarball.WithCompressionLevel(gzip.BestSpeed))
}

// busyboxLayer returns a root directory in which every applet of busybox can be
// called by its name.
func busyboxLayer(ctx context.Context) (v1.Layer, error) {
	binary, err := os.ReadFile(busyboxPath)
	if err != nil {
		return nil, fmt.Errorf("read Debian's busybox-static; run `make deps`: %w", err)
	}
	applets, err := exec.CommandContext(ctx, busyboxPath, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list applets of busybox: %w", err)
	}
	w := newLayerWriter()
	for _, dir := range []tar.Header{{Name: "bin/", Mode: 0o755}, {Name: "etc/", Mode: 0o755}, {Name: "root/", Mode: 0o700}, {Name: "tmp/", Mode: 0o1777}} {
		dir.Typeflag = tar.TypeDir
		w.add(dir, nil)
	}
	w.add(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	w.add(tar.Header{Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\nnogroup:x:65534:\n"))
	w.add(tar.Header{Name: "bin/busybox", Mode: 0o755}, binary)
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			w.add(tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeLink, Linkname: "bin/busybox", Mode: 0o755}, nil)
		}
	}
	return w.layer()
}

// filesLayer returns copies of the caller's files, with their permissions.
func filesLayer(files map[string]string) (v1.Layer, error) {
	w := newLayerWriter()
	for _, path := range slices.Sorted(maps.Keys(files)) {
		info, err := os.Stat(files[path])
		if err != nil {
			return nil, err
		}
		content, err := os.ReadFile(files[path])
		if err != nil {
			return nil, err
		}
		w.add(tar.Header{Name: strings.TrimPrefix(path, "/"), Mode: int64(info.Mode().Perm())}, content)
	}
	return w.layer()
}

// pullImages makes a node's containerd, for which it waits, fetch the cluster's
// images as kubelet would.
func (m *Machine) pullImages(ctx context.Context) error {
	conn, err := grpc.NewClient("unix://"+m.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connect to containerd of %s: %w", m.name, err)
	}
	defer conn.Close()
	client := cri.NewImageServiceClient(conn)
	for _, image := range []string{"pause", "busybox"} {
		err := m.cluster.retry(ctx, func() error {
			_, err := client.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: m.cluster.Image(image)}})
			return err
		})
		if err != nil {
			return fmt.Errorf("pull image %s on %s: %w", image, m.name, err)
		}
	}
	return nil
}
