package main

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/agent/auth/authtest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const succeeded = agentv1.BuildState_BUILD_STATE_SUCCEEDED

func TestUnixSocket(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir, configure(t, dir, "", ""))
	conn := p.dial(t)
	require.Equal(t, healthpb.HealthCheckResponse_SERVING, serving(t, conn))
	r, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(short(t))
	require.NoError(t, err)
	require.NoError(t, r.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "kiln.agent.v1.BuildService"}}))
	answer, err := r.Recv()
	require.NoError(t, err)
	require.NotEmpty(t, answer.GetFileDescriptorResponse().GetFileDescriptorProto())
	require.NoError(t, r.CloseSend())

	c := agentv1.NewBuildServiceClient(conn)
	info, err := c.GetInfo(short(t), &agentv1.GetInfoRequest{})
	require.NoError(t, err)
	require.Equal(t, "node-1", info.Node)
	require.EqualValues(t, 2, info.Slots)
	require.NotEmpty(t, info.Version)
	require.NotEmpty(t, info.BuildkitVersion)
	require.Len(t, info.Sandboxes, 1)
	require.True(t, info.Sandboxes[0].Available, info.Sandboxes[0].Problem)

	startBuild(t, c, "b1", inline("FROM scratch\nCOPY . /\n"))
	res := result(t, c, "b1")
	require.Equal(t, succeeded, res.State, "%v", res)
	b, err := c.GetBuild(short(t), &agentv1.GetBuildRequest{BuildId: "b1"})
	require.NoError(t, err)
	require.Equal(t, "default", b.Build.Tenant)

	code, body := p.page("/metrics")
	require.Equal(t, http.StatusOK, code)
	for _, metric := range []string{
		`kiln_agent_builds_total{reason="FAILURE_REASON_UNSPECIFIED",sandbox="userns",state="BUILD_STATE_SUCCEEDED"} 1`,
		`kiln_agent_grpc_requests_total{code="OK",method="StartBuild",service="kiln.agent.v1.BuildService"} 1`,
		`kiln_agent_info{node="node-1",`, "go_goroutines", "process_resident_memory_bytes",
	} {
		require.Contains(t, body, metric)
	}
	require.NotEmpty(t, p.records(t, "StartBuild"))
	require.NotContains(t, p.log(t), "COPY . /", "no request in the log")

	p.signal(t, syscall.SIGTERM)
	require.Equal(t, exitOK, p.wait(t))
	require.NoFileExists(t, p.socket)
}

// TestStockClient builds with buildctl.
func TestStockClient(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir, configure(t, dir, "", ""))
	src := t.TempDir()
	busybox, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(src, "busybox"), busybox, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(src, "Dockerfile"), []byte("FROM scratch\nCOPY busybox /busybox\nRUN [\"/busybox\",\"sh\",\"-c\",\"echo made > /f\"]\n"), 0o600))
	out := t.TempDir()
	cmd := exec.Command(bin(t, "buildctl"), "--addr", "unix://"+p.socket, "build", "--frontend", "dockerfile.v0",
		"--local", "context="+src, "--local", "dockerfile="+src, "--output", "type=local,dest="+out)
	text, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", text)
	made, err := os.ReadFile(filepath.Join(out, "f"))
	require.NoError(t, err)
	require.Equal(t, "made\n", string(made))
	require.NotEmpty(t, p.records(t, "Control/Solve"))
}

// TestPolicyOfStockClients has a tenant whose policy BuildKit's clients cannot be
// held to.
func TestPolicyOfStockClients(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir, configure(t, dir, "", "tenants: {overrides: {default: {network: none}}}\n"))
	text, err := exec.Command(bin(t, "buildctl"), "--addr", "unix://"+p.socket, "debug", "workers").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(text), "buildKitClients")

	c := agentv1.NewBuildServiceClient(p.dial(t))
	spec := inline("FROM scratch\nCOPY . /\n")
	spec.Network = agentv1.NetworkMode_NETWORK_MODE_EGRESS
	_, err = c.StartBuild(short(t), &agentv1.StartBuildRequest{BuildId: "b1", Spec: spec})
	require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	server, clients, other := authtest.NewCA(t), authtest.NewCA(t), authtest.NewCA(t)
	authtest.Write(t, dir, server.Issue(t, authtest.Leaf{}), clients)
	tcp := freePort(t)
	p := start(t, dir, configure(t, dir, `  tcp:
    address: "`+tcp+`"
    tls: {certFile: `+dir+`/tls.crt, keyFile: `+dir+`/tls.key, clientCAFiles: [`+dir+`/ca.crt]}
    clients:
    - {commonName: controller, role: controller}
    - {commonName: a, role: tenant, tenant: team-a}
    - {commonName: b, role: tenant, tenant: team-b}`, ""))
	as := func(ca *authtest.CA, leaf authtest.Leaf) agentv1.BuildServiceClient {
		pair := ca.Issue(t, leaf)
		return agentv1.NewBuildServiceClient(dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, &pair))))
	}
	info := func(c agentv1.BuildServiceClient) codes.Code {
		_, err := c.GetInfo(short(t), &agentv1.GetInfoRequest{})
		return status.Code(err)
	}
	a, b, controller := as(clients, authtest.Leaf{CommonName: "a"}), as(clients, authtest.Leaf{CommonName: "b"}), as(clients, authtest.Leaf{CommonName: "controller"})
	require.Equal(t, codes.OK, info(a))
	require.Equal(t, codes.OK, info(controller))
	require.Equal(t, codes.PermissionDenied, info(as(clients, authtest.Leaf{CommonName: "c"})), "another name")
	require.Equal(t, codes.Unavailable, info(as(other, authtest.Leaf{CommonName: "a"})), "another authority")
	require.Equal(t, codes.Unavailable, info(as(clients, authtest.Leaf{CommonName: "a", NotAfter: time.Now().Add(-time.Minute)})), "expired")
	require.Equal(t, codes.Unavailable, info(agentv1.NewBuildServiceClient(dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, nil))))), "no certificate")
	require.Equal(t, codes.Unavailable, info(agentv1.NewBuildServiceClient(dial(t, tcp, insecure.NewCredentials()))), "no TLS")
	require.NotEmpty(t, p.records(t, "connection refused"))
	_, page := p.page("/metrics")
	require.Greater(t, metric(t, page, "kiln_agent_tls_certificate_not_after_seconds"), float64(time.Now().Unix()))

	startBuild(t, a, "mine", inline("FROM scratch\nCOPY . /\n"))
	require.Equal(t, succeeded, result(t, a, "mine").State)
	_, err := b.GetBuild(short(t), &agentv1.GetBuildRequest{BuildId: "mine"})
	require.Equal(t, codes.NotFound, status.Code(err), "another's build by its ID")
	for what, crossed := range map[string]func() error{
		"start": func() error {
			_, err := b.StartBuild(short(t), &agentv1.StartBuildRequest{BuildId: "x", Tenant: "team-a", Spec: inline("FROM scratch\n")})
			return err
		},
		"get": func() error {
			_, err := b.GetBuild(short(t), &agentv1.GetBuildRequest{BuildId: "mine", Tenant: "team-a"})
			return err
		},
		"list": func() error {
			_, err := b.ListBuilds(short(t), &agentv1.ListBuildsRequest{Tenant: "team-a"})
			return err
		},
		"cancel": func() error {
			_, err := b.CancelBuild(short(t), &agentv1.CancelBuildRequest{BuildId: "mine", Tenant: "team-a"})
			return err
		},
		"prune": func() error {
			_, err := b.Prune(short(t), &agentv1.PruneRequest{Tenant: "team-a"})
			return err
		},
	} {
		require.Contains(t, []codes.Code{codes.PermissionDenied, codes.NotFound}, status.Code(crossed()), what)
	}
	got, err := controller.GetBuild(short(t), &agentv1.GetBuildRequest{BuildId: "mine", Tenant: "team-a"})
	require.NoError(t, err)
	require.Equal(t, "team-a", got.Build.Tenant)
	list, err := b.ListBuilds(short(t), &agentv1.ListBuildsRequest{})
	require.NoError(t, err)
	require.Empty(t, list.Builds)
}

func TestInsecureLoopback(t *testing.T) {
	dir, tcp := t.TempDir(), freePort(t)
	start(t, dir, configure(t, dir, `  tcp: {address: "`+tcp+`", insecureLoopback: true}`, ""))
	c := agentv1.NewBuildServiceClient(dial(t, tcp, insecure.NewCredentials()))
	startBuild(t, c, "b1", inline("FROM scratch\nCOPY . /\n"))
	require.Equal(t, succeeded, result(t, c, "b1").State)
	_, err := c.GetBuild(short(t), &agentv1.GetBuildRequest{BuildId: "b1", Tenant: "other"})
	require.Contains(t, []codes.Code{codes.PermissionDenied, codes.NotFound}, status.Code(err))
}

// TestTermDrains ends an agent while a build runs.
func TestTermDrains(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir, configure(t, dir, "", ""))
	conn := p.dial(t)
	c := agentv1.NewBuildServiceClient(conn)
	startBuild(t, c, "b1", uploaded(t, c, sleeper("3")))
	untilRunning(t, c, "b1")
	p.signal(t, syscall.SIGTERM)
	require.Eventually(t, func() bool { return serving(t, conn) == healthpb.HealthCheckResponse_NOT_SERVING }, 5*time.Second, 10*time.Millisecond)
	require.Eventually(t, func() bool { code, _ := p.page("/readyz"); return code == http.StatusServiceUnavailable }, 5*time.Second, 10*time.Millisecond)
	code, _ := p.page("/healthz")
	require.Equal(t, http.StatusOK, code)
	_, err := c.StartBuild(short(t), &agentv1.StartBuildRequest{BuildId: "b2", Spec: inline("FROM scratch\n")})
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
	require.Equal(t, succeeded, result(t, c, "b1").State)
	require.Equal(t, exitOK, p.wait(t))
}

// TestDrainTimeout ends an agent whose build takes longer than it may.
func TestDrainTimeout(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir, configure(t, dir, "", "  drainTimeout: 500ms\n"))
	c := agentv1.NewBuildServiceClient(p.dial(t))
	startBuild(t, c, "b1", uploaded(t, c, sleeper("60")))
	untilRunning(t, c, "b1")
	p.signal(t, syscall.SIGINT)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, result(t, c, "b1").State, "whoever watches is told")
	require.Equal(t, exitOK, p.wait(t))
}

func TestSecondSignalForces(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir, configure(t, dir, "", ""))
	c := agentv1.NewBuildServiceClient(p.dial(t))
	startBuild(t, c, "b1", uploaded(t, c, sleeper("60")))
	untilRunning(t, c, "b1")
	p.signal(t, syscall.SIGTERM)
	require.Eventually(t, func() bool { return len(p.records(t, "signal; the agent ends when")) == 1 }, 5*time.Second, 10*time.Millisecond)
	p.signal(t, syscall.SIGTERM)
	require.Equal(t, exitFailed, p.wait(t))
}

// TestKillLosesNoBuild kills an agent while a build runs, and starts it again.
func TestKillLosesNoBuild(t *testing.T) {
	dir := t.TempDir()
	cfg := configure(t, dir, "", "")
	p := start(t, dir, cfg)
	c := agentv1.NewBuildServiceClient(p.dial(t))
	startBuild(t, c, "b1", uploaded(t, c, sleeper("60")))
	untilRunning(t, c, "b1")
	p.signal(t, syscall.SIGKILL)
	p.wait(t)

	p = start(t, dir, cfg)
	c = agentv1.NewBuildServiceClient(p.dial(t))
	res := result(t, c, "b1")
	require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, res.State)
	require.Equal(t, agentv1.FailureReason_FAILURE_REASON_INTERRUPTED, res.Failure.GetReason())
	startBuild(t, c, "b2", inline("FROM scratch\nCOPY . /\n"))
	require.Equal(t, succeeded, result(t, c, "b2").State)
}

func TestIdleMemory(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir, configure(t, dir, "", ""))
	_, body := p.page("/metrics")
	rss := metric(t, body, "process_resident_memory_bytes")
	t.Logf("resident memory when idle: %.0f MiB", rss/(1<<20))
	require.Less(t, rss, float64(idleGoal))
}

// TestTermDuringStart tells an agent to end while another has its root.
func TestTermDuringStart(t *testing.T) {
	dir := t.TempDir()
	cfg := configure(t, dir, "", "")
	start(t, dir, cfg)
	cmd := command(t, "--config", cfg)
	require.NoError(t, cmd.Start())
	time.Sleep(time.Second)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait())
}
