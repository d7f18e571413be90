package containerd

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bin returns a program that the Makefile builds.
func bin(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "..", "..", "bin", name))
	require.NoError(t, err)
	_, err = os.Stat(path)
	require.NoError(t, err, "run `make build cluster-tools`")
	return path
}

// pauseImage is the image of Pod sandboxes, which the daemon pins.
const pauseImage = "kiln.test/pause:1"

// daemon is a containerd of its own, in a mount namespace of its own.
type daemon struct {
	t       *testing.T
	dir     string
	socket  string
	cmd     *exec.Cmd
	log     string
	client  *ctd.Client
	runtime runtimev1.RuntimeServiceClient
	images  runtimev1.ImageServiceClient
}

// startDaemon starts containerd with the CRI, and with more lines for the
// configuration of its images. It needs root.
func startDaemon(t *testing.T, imageConfig string) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "kiln-containerd") // t.TempDir is too long for a socket
	require.NoError(t, err)
	d := &daemon{t: t, dir: dir, socket: filepath.Join(dir, "c.sock"), log: filepath.Join(dir, "log")}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(d.log)
			t.Logf("containerd:\n%s", log[max(0, len(log)-8000):])
		}
		require.NoError(t, os.RemoveAll(dir))
		requireNothingOf(t, dir)
	})
	config := fmt.Sprintf(`version = 3
root = %[1]q
state = %[2]q
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs", "io.containerd.differ.v1.erofs", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing"]
[grpc]
  address = %[3]q
[ttrpc]
  address = %[4]q
[plugins.'io.containerd.internal.v1.opt']
  path = %[5]q
[plugins.'io.containerd.gc.v1.scheduler']
  schedule_delay = '0s'
  startup_delay = '0s'
[plugins.'io.containerd.cri.v1.images']
  %[6]s
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %[7]q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = [%[8]q]
  conf_dir = %[8]q
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = %[9]q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), d.socket, d.socket+".ttrpc", filepath.Join(dir, "opt"), imageConfig, pauseImage,
		filepath.Join(dir, "cni"), bin(t, "runc"))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600))
	d.start()
	t.Cleanup(d.stop)
	return d
}

// start starts containerd and waits for its CRI.
func (d *daemon) start() {
	d.t.Helper()
	d.launch()
	require.Eventually(d.t, func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := d.images.ListImages(ctx, &runtimev1.ListImagesRequest{})
		return err == nil
	}, 30*time.Second, 20*time.Millisecond, "containerd does not answer")
}

func (d *daemon) launch() {
	d.t.Helper()
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(d.t, err)
	defer log.Close()
	// The sockets of shims are below /run, whatever the configuration says.
	d.cmd = exec.Command("/bin/sh", "-c", `mount -t tmpfs tmpfs /run && exec "$@"`, "sh",
		bin(d.t, "containerd"), "--config", filepath.Join(d.dir, "config.toml"))
	d.cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(bin(d.t, "containerd-shim-runc-v2"))+":"+os.Getenv("PATH"))
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	require.NoError(d.t, d.cmd.Start())
	dial := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.socket)
	})
	d.client, err = ctd.New(d.socket, ctd.WithDefaultNamespace(namespace), ctd.WithExtraDialOpts([]grpc.DialOption{dial}))
	require.NoError(d.t, err)
	conn := d.client.Conn().(*grpc.ClientConn)
	d.runtime, d.images = runtimev1.NewRuntimeServiceClient(conn), runtimev1.NewImageServiceClient(conn)
}

// requireNothingOf fails when a process or a mount of the daemon in dir is left.
func requireNothingOf(t *testing.T, dir string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), dir)
	left := func() (all []string) {
		procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range procs {
			if cmdline, err := os.ReadFile(p); err == nil && strings.Contains(string(cmdline), dir) {
				all = append(all, string(cmdline))
			}
		}
		return all
	}
	require.Eventually(t, func() bool { return len(left()) == 0 }, 5*time.Second, 50*time.Millisecond, "processes are left")
}

// stop ends containerd; a second call does nothing.
func (d *daemon) stop() {
	if d.cmd == nil {
		return
	}
	_ = d.client.Close()
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	_ = d.cmd.Wait()
	d.cmd = nil
}

// node connects kiln to the daemon.
func (d *daemon) node(owner string) *Node {
	d.t.Helper()
	n, err := New(d.t.Context(), Config{Socket: d.socket, Owner: owner})
	require.NoError(d.t, err)
	d.t.Cleanup(func() { _ = n.Close() })
	return n
}

// holdings lists everything that containerd has in the kubelet's namespace.
func (d *daemon) holdings() []string {
	d.t.Helper()
	ctx := d.t.Context()
	var all []string
	leases, err := d.client.LeasesService().List(ctx)
	require.NoError(d.t, err)
	for _, l := range leases {
		all = append(all, "lease "+l.ID)
	}
	images, err := d.client.ImageService().List(ctx)
	require.NoError(d.t, err)
	for _, i := range images {
		all = append(all, "image "+i.Name+" "+i.Target.Digest.String())
	}
	return append(all, d.contents()...)
}

// contents lists the blobs, ingests and snapshots.
func (d *daemon) contents() []string {
	d.t.Helper()
	ctx := d.t.Context()
	all := walkContent(d.t, ctx, d.client.ContentStore())
	return append(all, walkSnapshots(d.t, ctx, d.client.SnapshotService("overlayfs"))...)
}

// registry is Debian's docker-registry behind a proxy that counts.
type registry struct {
	addr string

	mu       sync.Mutex
	requests []string
	// sent counts the bytes of blobs that were served.
	sent int64
}

func startRegistry(t *testing.T) *registry {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	dir := t.TempDir()
	config := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: %q}\n", dir, addr)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.yml"), []byte(config), 0o600))
	cmd := exec.Command("docker-registry", "serve", filepath.Join(dir, "config.yml"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, cmd.Start(), "Debian's docker-registry is missing; run `make deps`")
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, 10*time.Second, 20*time.Millisecond, "the registry does not answer")

	r := &registry{}
	transport := &http.Transport{}
	proxy := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(&url.URL{Scheme: "http", Host: addr})
			p.Out.Host = p.In.Host // the registry makes URLs of it
		},
		ModifyResponse: func(resp *http.Response) error {
			if resp.Request.Method == http.MethodGet && strings.Contains(resp.Request.URL.Path, "/blobs/") && resp.StatusCode < 300 {
				r.mu.Lock()
				defer r.mu.Unlock()
				r.sent += resp.ContentLength
			}
			return nil
		},
	}
	front, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r.addr = front.Addr().String()
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.requests = append(r.requests, req.Method+" "+req.URL.Path)
		r.mu.Unlock()
		proxy.ServeHTTP(w, req)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(front) }()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
		transport.CloseIdleConnections()
	})
	return r
}

// forget clears the records.
func (r *registry) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests, r.sent = nil, 0
}

func (r *registry) records() (requests []string, sent int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.requests...), r.sent
}
