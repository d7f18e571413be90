package escape

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/prototext"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(entry{
	ID: "fault/containerd-killed", Severity: takesNodeDown,
	Threat: "The node's containerd is killed at any moment while it lends a base image to a build, or receives what was built.",
	Test:   containerdKilled,
})

// runtimeOfNode is a containerd with the CRI, in a mount namespace of its own.
type runtimeOfNode struct {
	dir, socket string
	cmd         *exec.Cmd
	ended       chan struct{}
}

// containerd starts one, with its sockets in dir, which must have a short name.
func (e *env) containerd(t *testing.T) *runtimeOfNode {
	t.Helper()
	dir, err := os.MkdirTemp("", "kiln-ctd") // a test's own is too long for a socket
	require.NoError(t, err)
	r := &runtimeOfNode{dir: dir, socket: filepath.Join(dir, "c.sock")}
	t.Cleanup(func() {
		r.kill(syscall.SIGTERM)
		noProcess(t, dir)
		require.NoError(t, os.RemoveAll(dir))
	})
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.toml"), fmt.Appendf(nil, `version = 3
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs", "io.containerd.differ.v1.erofs", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing"]
[grpc]
  address = "%[1]s/c.sock"
[ttrpc]
  address = "%[1]s/c.sock.ttrpc"
[plugins.'io.containerd.internal.v1.opt']
  path = "%[1]s/opt"
[plugins.'io.containerd.gc.v1.scheduler']
  schedule_delay = '0s'
  startup_delay = '0s'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["%[1]s/cni"]
  conf_dir = "%[1]s/cni"
`, dir), 0o600))
	r.start(t)
	return r
}

func (r *runtimeOfNode) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(r.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	defer log.Close()
	r.cmd = exec.Command("unshare", "--mount", agenttest.RepoBin(t, "containerd"), "--config", filepath.Join(r.dir, "config.toml"))
	r.cmd.Stdout, r.cmd.Stderr = log, log
	require.NoError(t, startBound(r.cmd))
	ended, cmd := make(chan struct{}), r.cmd
	r.ended = ended
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	require.Eventually(t, func() (ok bool) {
		r.ask(t, func(ctx context.Context, c *ctd.Client) {
			_, err := runtimev1.NewImageServiceClient(c.Conn().(*grpc.ClientConn)).ListImages(ctx, &runtimev1.ListImagesRequest{})
			ok = err == nil
		})
		return ok
	}, 30*time.Second, 50*time.Millisecond, "containerd does not answer; see %s", filepath.Join(r.dir, "log"))
}

func (r *runtimeOfNode) kill(s syscall.Signal) {
	_ = r.cmd.Process.Signal(s) // it may be dead
	<-r.ended
}

// ask calls f with a client of the kubelet's namespace.
func (r *runtimeOfNode) ask(t *testing.T, f func(context.Context, *ctd.Client)) {
	t.Helper()
	c, err := ctd.New(r.socket, ctd.WithDefaultNamespace("k8s.io"), ctd.WithExtraDialOpts([]grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", r.socket)
	})}))
	require.NoError(t, err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(t.Context(), "k8s.io"), 20*time.Second)
	defer cancel()
	f(ctx, c)
}

// holdings lists what containerd has: leases, images, blobs, uploads and snapshots.
func (r *runtimeOfNode) holdings(t *testing.T) (all []string) {
	t.Helper()
	r.ask(t, func(ctx context.Context, c *ctd.Client) {
		held, err := c.LeasesService().List(ctx)
		require.NoError(t, err)
		for _, l := range held {
			all = append(all, "lease "+l.ID)
		}
		named, err := c.ImageService().List(ctx)
		require.NoError(t, err)
		for _, i := range named {
			all = append(all, "image "+i.Name+" "+i.Target.Digest.String())
		}
		require.NoError(t, c.ContentStore().Walk(ctx, func(i content.Info) error {
			all = append(all, "blob "+i.Digest.String())
			return nil
		}))
		arriving, err := c.ContentStore().ListStatuses(ctx)
		require.NoError(t, err)
		for _, a := range arriving {
			all = append(all, "arriving "+a.Ref)
		}
		require.NoError(t, c.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			all = append(all, "snapshot "+i.Name)
			return nil
		}))
	})
	slices.Sort(all)
	return all
}

// pull has containerd pull an image as the kubelet's, from a registry without TLS that
// may ask for a password.
func (r *runtimeOfNode) pull(t *testing.T, ref, password string) {
	t.Helper()
	creds := docker.NewDockerAuthorizer(docker.WithAuthCreds(func(string) (string, string, error) { return "user", password, nil }))
	r.ask(t, func(ctx context.Context, c *ctd.Client) {
		_, err := c.Pull(ctx, ref, ctd.WithPullUnpack, ctd.WithPullSnapshotter("overlayfs"),
			ctd.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts), docker.WithAuthorizer(creds))})))
		require.NoError(t, err)
	})
}

// large is an image of several megabytes that do not compress, and busybox.
func large(t *testing.T) hostile.Image {
	t.Helper()
	program, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	noise := make([]byte, 24<<20)
	_, err = rand.Read(noise)
	require.NoError(t, err)
	return hostile.NewImage([][]byte{hostile.Tar(hostile.Plain,
		hostile.Entry{Type: hostile.Directory, Name: "bin", Mode: 0o755},
		hostile.Entry{Type: hostile.File, Name: "bin/busybox", Mode: 0o755, Body: string(program)},
		hostile.Entry{Type: hostile.File, Name: "noise", Mode: 0o644, Body: string(noise)},
	)}, nil)
}

// containerdKilled kills it at many moments of a build that takes its base from it and
// puts the result into it. The build succeeds, or fails and says why; when containerd is
// back the next one succeeds, and nothing is left of those before.
func containerdKilled(t *testing.T, e *env) {
	node := e.containerd(t)
	dir := e.dir(t)
	e.agentFiles(t, dir, "nodeRuntime: {socket: "+node.socket+"}\ntenants: {defaults: {nodeImages: [registry.example]}}\n")
	p := e.startAgent(t, dir)
	ctx := agenttest.Context(t, attacker)
	states := map[agentv1.BuildState]int{}
	for i, delay := range []time.Duration{0, 50, 150, 300, 600, 1200} {
		im := large(t) // new for each, for it to be lent anew
		reg := registryOf(t, e, im, nil)
		node.pull(t, reg.Address+"/image:latest", "")
		before := node.holdings(t)
		name := fmt.Sprintf("registry.example/built-%s-%d", e.Class, i)
		spec := agenttest.Dockerfile(fmt.Sprintf("FROM %s/image\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo %d > /written\"]\n", reg.Address, i))
		spec.Outputs = []*agentv1.Output{{To: &agentv1.Output_Node{Node: &agentv1.NodeOutput{Image: name}}}}
		id := fmt.Sprintf("killed-%d", i)
		_, err := p.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
		require.NoError(t, err)
		time.Sleep(delay * time.Millisecond)
		node.kill(syscall.SIGKILL)
		result := p.result(t, ctx, id)
		states[result.GetState()]++
		if result.GetState() != agentv1.BuildState_BUILD_STATE_SUCCEEDED {
			require.Contains(t, result.GetFailure().GetMessage(), "containerd", "%s", prototext.Format(result))
		}
		node.start(t)

		spec.Strategy = agenttest.Dockerfile(fmt.Sprintf("FROM %s/image\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo after-%d > /written\"]\n", reg.Address, i)).Strategy
		_, err = p.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id + "-after", Spec: spec})
		require.NoError(t, err)
		p.succeeds(t, ctx, id+"-after")
		// What was received goes, so that what else is left is seen.
		node.ask(t, func(ctx context.Context, c *ctd.Client) {
			all, err := c.ImageService().List(ctx)
			require.NoError(t, err)
			for _, img := range all {
				if !slices.Contains(before, "image "+img.Name+" "+img.Target.Digest.String()) {
					require.NoError(t, c.ImageService().Delete(ctx, img.Name, images.SynchronousDelete()))
				}
			}
		})
		require.Equal(t, before, node.holdings(t), "%s: something is left", prototext.Format(result))
	}
	t.Logf("builds whose containerd was killed: %v", states)
	require.NotZero(t, states[agentv1.BuildState_BUILD_STATE_FAILED], "it was never killed while it received")
}
