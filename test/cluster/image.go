package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
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
	layer, err := busyboxLayer(ctx)
	if err != nil {
		return err
	}
	transport := remote.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	defer transport.CloseIdleConnections()
	for image, entrypoint := range map[string][]string{
		"busybox": nil,
		"pause":   {"/bin/sh", "-c", `trap "exit 0" TERM; while :; do sleep 86400 & wait $!; done`},
	} {
		img, err := makeImage(layer, entrypoint)
		if err != nil {
			return fmt.Errorf("make image %s: %w", image, err)
		}
		ref, err := name.NewTag(c.Image(image), name.Insecure)
		if err != nil {
			return fmt.Errorf("name image %s: %w", image, err)
		}
		err = c.retry(ctx, func() error { return remote.Write(ref, img, remote.WithContext(ctx), remote.WithTransport(transport)) })
		if err != nil {
			return fmt.Errorf("push image %s: %w", image, err)
		}
	}
	return nil
}

func makeImage(layer v1.Layer, entrypoint []string) (v1.Image, error) {
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Config = v1.Config{Env: []string{"PATH=/bin"}, Entrypoint: entrypoint}
	if entrypoint == nil {
		file.Config.Cmd = []string{"/bin/sh"}
	}
	return mutate.ConfigFile(img, file)
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
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		err = errors.Join(err, w.WriteHeader(&h))
		_, werr := w.Write(content)
		err = errors.Join(err, werr)
	}
	for dir, mode := range map[string]int64{"bin/": 0o755, "etc/": 0o755, "root/": 0o700, "tmp/": 0o1777} {
		add(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: mode}, nil)
	}
	add(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	add(tar.Header{Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\nnogroup:x:65534:\n"))
	add(tar.Header{Name: "bin/busybox", Mode: 0o755}, binary)
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			add(tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeLink, Linkname: "bin/busybox", Mode: 0o755}, nil)
		}
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	})
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
