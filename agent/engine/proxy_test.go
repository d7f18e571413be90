package engine

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/sandbox"
)

func openTestNode(t *testing.T) *Node {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir())
	n, err := OpenNode(context.Background(), NodeConfig{Root: filepath.Join(t.TempDir(), "private"), RunscPath: repoBin(t, "runsc")})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	return n
}

// serveProxy serves BuildKit's API for one tenant on loopback.
func serveProxy(t *testing.T, pick Pick) *client.Client {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := grpc.NewServer(Proxy(pick)...)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	c, err := client.New(context.Background(), "tcp://"+l.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() {
		c.Close()
		s.Stop()
		require.NoError(t, <-served)
	})
	return c
}

func (n *Node) pickTenant(d Domain) Pick {
	return func(ctx context.Context) (*Engine, func(), error) { return n.Engine(ctx, d) }
}

func TestProxyServesStockClients(t *testing.T) {
	n := openTestNode(t)
	c := serveProxy(t, n.pickTenant(Domain{Tenant: "a", Sandbox: sandbox.Userns}))
	out, log, err := build(t, c, "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\",\"sh\",\"-c\",\"echo hello; echo made > /f\"]\n", nil, nil)
	require.NoError(t, err, log)
	got, err := os.ReadFile(filepath.Join(out, "f"))
	require.NoError(t, err)
	require.Equal(t, "made\n", string(got))
	_, _, err = build(t, c, "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\",\"false\"]\n", nil, nil)
	require.ErrorContains(t, err, "exit code: 1")
}

func TestProxyRefusesWhatPickRefuses(t *testing.T) {
	c := serveProxy(t, func(context.Context) (*Engine, func(), error) {
		return nil, nil, status.Error(codes.PermissionDenied, "not yours")
	})
	_, err := c.Info(context.Background())
	require.ErrorContains(t, err, "not yours")
}

func TestProxyForwardsOnlyServicesOfBuildKit(t *testing.T) {
	for method, want := range map[string]bool{
		"/moby.buildkit.v1.Control/Solve":             true,
		"/moby.buildkit.v1.frontend.LLBBridge/Ping":   true,
		"/moby.buildkit.v1.Controller/Solve":          false,
		"/kiln.agent.v1.BuildService/StartBuild":      false,
		"/containerd.services.content.v1.Content/":    true,
		"/containerd.services.images.v1.Images/Get":   false,
		"moby.buildkit.v1.Control/Solve":              false,
		"/moby.buildkit.v1.Control":                   false,
		"/grpc.reflection.v1.ServerReflection/Server": false,
	} {
		require.Equal(t, want, proxied(method), method)
	}
}

// TestDomainsShareNothingButContent runs the same step for two tenants and in two
// classes: none may be answered by what another's run left.
func TestDomainsShareNothingButContent(t *testing.T) {
	n := openTestNode(t)
	busybox, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "busybox"), busybox, 0o755))
	fs, err := fsutil.NewFS(dir)
	require.NoError(t, err)
	st := llb.Scratch().File(llb.Copy(llb.Local("ctx", llb.SharedKeyHint("same")), "/busybox", "/busybox")).
		Run(llb.Args([]string{"/busybox", "sh", "-c", "/busybox cat /cache/who; echo here >> /cache/who; /busybox cat /proc/sys/kernel/random/uuid > /id"}),
			llb.AddMount("/cache", llb.Scratch(), llb.AsPersistentCacheDir("same", llb.CacheMountShared))).Root()
	def, err := st.Marshal(context.Background(), llb.LinuxAmd64)
	require.NoError(t, err)
	run := func(d Domain) (id, log string) {
		e, release, err := n.Engine(context.Background(), d)
		require.NoError(t, err)
		defer release()
		c, err := e.Client(context.Background())
		require.NoError(t, err)
		defer c.Close()
		out := t.TempDir()
		var logs bytes.Buffer
		ch := make(chan *client.SolveStatus)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for s := range ch {
				for _, l := range s.Logs {
					logs.Write(l.Data)
				}
			}
		}()
		_, err = c.Solve(context.Background(), def, client.SolveOpt{
			LocalMounts: map[string]fsutil.FS{"ctx": fs},
			Exports:     []client.ExportEntry{{Type: client.ExporterLocal, OutputDir: out}},
		}, ch)
		<-done
		require.NoError(t, err, logs.String())
		data, err := os.ReadFile(filepath.Join(out, "id"))
		require.NoError(t, err)
		return string(data), logs.String()
	}
	a := Domain{Tenant: "team-a", Sandbox: sandbox.Userns}
	first, log := run(a)
	require.NotContains(t, log, "here")
	again, _ := run(a)
	require.Equal(t, first, again, "the second build of a tenant is a cache hit")
	ids := map[string]bool{first: true}
	for _, d := range []Domain{{Tenant: "team-b", Sandbox: sandbox.Userns}, {Tenant: "team-a", Sandbox: sandbox.GVisor}} {
		id, log := run(d)
		require.NotContains(t, log, "here", "cache mount of another domain")
		require.False(t, ids[id], "result of another domain")
		ids[id] = true
	}
	all, err := n.Domains()
	require.NoError(t, err)
	require.Len(t, all, 3)
}

func TestEngineOfBadDomainIsRefused(t *testing.T) {
	n := openTestNode(t)
	for _, d := range []Domain{
		{Tenant: "", Sandbox: sandbox.Userns}, {Tenant: "../a", Sandbox: sandbox.Userns}, {Tenant: "A", Sandbox: sandbox.Userns},
		{Tenant: "a", Sandbox: "runc"}, {Tenant: "a"},
	} {
		_, _, err := n.Engine(context.Background(), d)
		require.Error(t, err, "%+v", d)
	}
	all, err := n.Domains()
	require.NoError(t, err)
	require.Empty(t, all)
}
