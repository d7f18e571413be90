package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// beAgent makes the test program be kiln-agent.
const beAgent = "KILN_TEST_BE_AGENT"

func TestMain(m *testing.M) {
	if os.Getenv(beAgent) != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// process is an agent in a process of its own.
type process struct {
	cmd                *exec.Cmd
	dir, socket, pages string
	out                *os.File
	ended              chan error
}

func bin(t testing.TB, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "..", "bin", name))
	require.NoError(t, err)
	_, err = os.Stat(p)
	require.NoError(t, err, "run 'make build' first")
	return p
}

func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), beAgent+"=1")
	// An agent never outlives its test.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// configure writes a configuration for dir; more is appended to it. Its steps run in
// user namespaces.
func configure(t testing.TB, dir, listeners, more string) string {
	t.Helper()
	file := filepath.Join(dir, "agent.yaml")
	text := fmt.Sprintf(`apiVersion: config.kiln.build/v1alpha1
kind: AgentConfiguration
root: %[1]s/root
nodeName: node-1
listeners:
  unix:
    path: %[1]s/agent.sock
%[2]s
sandboxes:
  default: userns
  enabled: [userns]
builds:
  slots: 2
  minFreeDisk: 10Mi
%[3]s
`, dir, listeners, more)
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	return file
}

// start runs an agent in dir and waits until it is ready.
func start(t *testing.T, dir, config string) *process {
	t.Helper()
	p := &process{dir: dir, socket: filepath.Join(dir, "agent.sock"), pages: freePort(t), ended: make(chan error, 1)}
	data, err := os.ReadFile(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(config+".run", append(data, []byte("metrics: {address: \""+p.pages+"\"}\nhealth: {address: \""+p.pages+"\"}\n")...), 0o600))
	p.out, err = os.OpenFile(filepath.Join(dir, "log"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	require.NoError(t, err)
	p.cmd = command(t, "--config", config+".run", "--log-level", "debug")
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	require.NoError(t, p.cmd.Start())
	go func() { p.ended <- p.cmd.Wait() }()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		select {
		case <-p.ended:
		case <-time.After(10 * time.Second):
			t.Error("the agent does not end")
		}
		p.out.Close()
		if t.Failed() {
			t.Logf("log of the agent:\n%s", p.log(t))
		}
	})
	require.Eventually(t, func() bool {
		code, _ := p.page("/readyz")
		_, err := os.Stat(p.socket)
		return code == http.StatusOK && err == nil
	}, time.Minute, 20*time.Millisecond)
	return p
}

func (p *process) log(t testing.TB) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(p.dir, "log"))
	require.NoError(t, err)
	return string(data)
}

// wait returns the exit code.
func (p *process) wait(t *testing.T) int {
	t.Helper()
	select {
	case err := <-p.ended:
		p.ended <- err
	case <-time.After(30 * time.Second):
		t.Fatal("the agent does not end")
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) signal(t *testing.T, s os.Signal) {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(s))
}

func (p *process) page(path string) (int, string) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + p.pages + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}

func (p *process) dial(t *testing.T) *grpc.ClientConn {
	t.Helper()
	return dial(t, "unix://"+p.socket, insecure.NewCredentials())
}

func dial(t *testing.T, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func short(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func serving(t *testing.T, conn *grpc.ClientConn) healthpb.HealthCheckResponse_ServingStatus {
	t.Helper()
	h, err := healthpb.NewHealthClient(conn).Check(short(t), &healthpb.HealthCheckRequest{})
	require.NoError(t, err)
	return h.Status
}

// uploaded stores an archive of files and returns a spec of a Dockerfile in it.
func uploaded(t *testing.T, c agentv1.BuildServiceClient, dockerfile string) *agentv1.BuildSpec {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, data := range map[string][]byte{"Dockerfile": []byte(dockerfile), "busybox": busybox} {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))}))
		_, err := w.Write(data)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	up, err := c.UploadSource(short(t))
	require.NoError(t, err)
	dgst := digest.FromBytes(buf.Bytes()).String()
	require.NoError(t, up.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Header{Header: &agentv1.UploadHeader{Digest: dgst, Size: int64(buf.Len())}}}))
	for buf.Len() > 0 {
		require.NoError(t, up.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Data{Data: bytes.Clone(buf.Next(1 << 20))}}))
	}
	_, err = up.CloseAndRecv()
	require.NoError(t, err)
	return &agentv1.BuildSpec{
		Source:   &agentv1.Source{From: &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: dgst}}},
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}},
	}
}

// sleeper is a build that takes as long as it says.
func sleeper(seconds string) string {
	return "FROM scratch\nCOPY busybox /busybox\nRUN [\"/busybox\",\"sleep\",\"" + seconds + "\"]\n"
}

// inline is the spec of a build without steps.
func inline(dockerfile string) *agentv1.BuildSpec {
	return &agentv1.BuildSpec{
		Source: &agentv1.Source{From: &agentv1.Source_Inline{Inline: &agentv1.InlineSource{Files: []*agentv1.InlineFile{
			{Path: "Dockerfile", Content: []byte(dockerfile)}, {Path: "data", Content: []byte("hello")},
		}}}},
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}},
	}
}

func startBuild(t *testing.T, c agentv1.BuildServiceClient, id string, spec *agentv1.BuildSpec) {
	t.Helper()
	_, err := c.StartBuild(short(t), &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
	require.NoError(t, err)
}

// result follows a build to its end.
func result(t *testing.T, c agentv1.BuildServiceClient, id string) *agentv1.BuildResult {
	t.Helper()
	watch, err := c.WatchBuild(short(t), &agentv1.WatchBuildRequest{BuildId: id})
	require.NoError(t, err)
	for {
		ev, err := watch.Recv()
		require.NoError(t, err)
		if r := ev.GetEvent().GetResult(); r != nil {
			_, err := watch.Recv()
			require.ErrorIs(t, err, io.EOF)
			return r
		}
	}
}

// untilRunning waits until a build runs its first RUN step.
func untilRunning(t *testing.T, c agentv1.BuildServiceClient, id string) {
	t.Helper()
	watch, err := c.WatchBuild(short(t), &agentv1.WatchBuildRequest{BuildId: id})
	require.NoError(t, err)
	for {
		ev, err := watch.Recv()
		require.NoError(t, err)
		require.Nil(t, ev.GetEvent().GetResult(), "%v", ev)
		if s := ev.GetEvent().GetStep().GetStep(); s.GetStartedAt() != nil && strings.Contains(s.GetName(), "RUN") {
			return
		}
	}
}

// records returns the log's records that contain text.
func (p *process) records(t *testing.T, text string) []map[string]any {
	t.Helper()
	var out []map[string]any
	for line := range strings.Lines(p.log(t)) {
		if strings.Contains(line, text) {
			var r map[string]any
			require.NoError(t, json.Unmarshal([]byte(line), &r), line)
			out = append(out, r)
		}
	}
	return out
}
