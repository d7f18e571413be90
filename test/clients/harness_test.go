package clients

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// commandTimeout bounds one command of a client.
const commandTimeout = 2 * time.Minute

var classes = []string{"gvisor", "userns"}

func bin(t testing.TB, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "..", "bin", name))
	require.NoError(t, err)
	_, err = os.Stat(p)
	require.NoError(t, err, "run `make build test-tools` first")
	return p
}

// agent is a running kiln-agent with a client's own configuration.
type agent struct {
	t            *testing.T
	dir, socket  string
	cmd          *exec.Cmd
	ended        chan error
	clientConfig string
}

// startAgent starts an agent whose steps run in sandboxes of class. more is added
// to its configuration.
func startAgent(t *testing.T, class, more string) *agent {
	t.Helper()
	dir := t.TempDir()
	// Clients that are not root have to reach the socket.
	require.NoError(t, os.Chmod(dir, 0o755))
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o755))
	a := &agent{t: t, dir: dir, socket: filepath.Join(dir, "agent.sock"), ended: make(chan error, 1), clientConfig: filepath.Join(dir, "client")}
	pages := freeAddress(t)
	config := filepath.Join(dir, "agent.yaml")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `apiVersion: config.kiln.build/v1alpha1
kind: AgentConfiguration
root: %s
sandboxes: {default: %s, runscPath: %q}
metrics: {address: %q}
health: {address: %q}
fetch: {allow: [127.0.0.1/32]}
listeners:
  unix:
    path: %s
%s`, filepath.Join(dir, "root"), class, bin(t, "runsc"), pages, pages, a.socket, more), 0o600))
	log, err := os.Create(filepath.Join(dir, "log"))
	require.NoError(t, err)
	a.cmd = exec.Command(bin(t, "kiln-agent"), "--config", config)
	a.cmd.Stdout, a.cmd.Stderr = log, log
	require.NoError(t, a.cmd.Start())
	go func() { a.ended <- a.cmd.Wait() }()
	t.Cleanup(func() {
		require.NoError(t, a.cmd.Process.Signal(syscall.SIGTERM))
		select {
		case err := <-a.ended:
			require.NoError(t, err)
		case <-time.After(time.Minute):
			t.Error("the agent does not end")
			_ = a.cmd.Process.Kill()
		}
		log.Close()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("end of the agent's log:\n%s", text[max(0, len(text)-4096):])
		}
	})
	require.Eventually(t, func() bool {
		r, err := http.Get("http://" + pages + "/readyz")
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == http.StatusOK
	}, time.Minute, 20*time.Millisecond, "the agent is not ready")
	return a
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// result is how a command ended.
type result struct {
	code int
	out  string // both streams
}

// run runs a client. Env and Credential of the command may be changed by with.
func (a *agent) run(with func(*exec.Cmd), name string, args ...string) result {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin(a.t, name), args...)
	cmd.Env = append(os.Environ(), "BUILDX_CONFIG="+a.clientConfig, "DOCKER_CONFIG="+a.clientConfig)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if with != nil {
		with(cmd)
	}
	err := cmd.Run()
	require.NoError(a.t, ctx.Err(), "%s %q does not end: %s", name, args, out.String())
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		a.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String()}
}

// buildctl runs buildctl, which must succeed.
func (a *agent) buildctl(args ...string) string {
	a.t.Helper()
	r := a.run(nil, "buildctl", append([]string{"--addr", "unix://" + a.socket}, args...)...)
	require.Zero(a.t, r.code, "buildctl %q: %s", args, r.out)
	return r.out
}

// buildx runs buildx, which must succeed.
func (a *agent) buildx(args ...string) string {
	a.t.Helper()
	r := a.run(nil, "buildx", args...)
	require.Zero(a.t, r.code, "buildx %q: %s", args, r.out)
	return r.out
}

// useBuildx makes the agent the current builder of buildx.
func (a *agent) useBuildx() {
	a.t.Helper()
	a.buildx("create", "--name", "kiln", "--driver", "remote", "--use", "unix://"+a.socket)
}

// inEachSandbox runs f with an agent of each class.
func inEachSandbox(t *testing.T, f func(t *testing.T, a *agent)) {
	t.Helper()
	for _, class := range classes {
		t.Run(class, func(t *testing.T) { f(t, startAgent(t, class, "")) })
	}
}

// base is the start of a Dockerfile: a stage called base with busybox in it.
const base = `FROM scratch AS base
COPY --from=tools busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
ENV PATH=/bin
RUN ["/bin/busybox", "--install", "-s", "/bin"]
FROM base
`

// tools is a directory with Debian's static busybox.
func tools(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	data, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "Debian's busybox-static is missing; run `make deps`")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "busybox"), data, 0o755))
	return dir
}

// contextDir writes a Dockerfile and files into a new directory.
func contextDir(t *testing.T, dockerfile string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(content), 0o644))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644))
	return dir
}

func read(t *testing.T, parts ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(parts...))
	require.NoError(t, err)
	return strings.TrimSpace(string(data))
}

func readJSON(t *testing.T, v any, parts ...string) {
	t.Helper()
	require.NoError(t, json.Unmarshal([]byte(read(t, parts...)), v))
}
