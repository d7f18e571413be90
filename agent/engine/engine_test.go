package engine

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/sandbox"
)

// testTimeout bounds one build of a test.
const testTimeout = 2 * time.Minute

// repoBin is where the Makefile puts the OCI runtimes.
func repoBin(t *testing.T, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "..", "bin", name))
	require.NoError(t, err)
	_, err = os.Stat(p)
	require.NoError(t, err, "run `make build` first")
	return p
}

func newTestEngine(t *testing.T, class sandbox.Class, frontends ...string) *client.Client {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir())
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	e, err := New(ctx, Config{
		NodeConfig: NodeConfig{Root: filepath.Join(t.TempDir(), "private"), Frontends: frontends, RunscPath: repoBin(t, "runsc")},
		Sandbox:    class,
	})
	require.NoError(t, err)
	c, err := e.Client(ctx)
	require.NoError(t, err)
	t.Cleanup(func() {
		cancel()
		require.NoError(t, c.Close())
		require.NoError(t, e.Close())
	})
	return c
}

// build builds a Dockerfile over files, exports the result into a directory and
// returns that.
func build(t *testing.T, c *client.Client, dockerfile string, files map[string]string, attrs map[string]string) (string, string, error) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644))
	for name, content := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755))
	}
	if _, ok := files["busybox"]; !ok {
		data, err := os.ReadFile("/bin/busybox")
		require.NoError(t, err, "install Debian's busybox-static")
		require.NoError(t, os.WriteFile(filepath.Join(dir, "busybox"), data, 0o755))
	}
	fs, err := fsutil.NewFS(dir)
	require.NoError(t, err)
	out := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	var log bytes.Buffer
	ch := make(chan *client.SolveStatus)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range ch {
			for _, l := range s.Logs {
				log.Write(l.Data)
			}
		}
	}()
	if attrs == nil {
		attrs = map[string]string{}
	}
	_, err = c.Solve(ctx, nil, client.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: attrs,
		LocalMounts: map[string]fsutil.FS{"context": fs, "dockerfile": fs},
		Exports:     []client.ExportEntry{{Type: client.ExporterLocal, OutputDir: out}},
	}, ch)
	<-done
	return out, log.String(), err
}

func TestCopyNeedsNoSandbox(t *testing.T) {
	c := newTestEngine(t, sandbox.GVisor)
	out, _, err := build(t, c, "FROM scratch\nCOPY hello /hello\n", map[string]string{"hello": "world"}, nil)
	require.NoError(t, err)
	got, err := os.ReadFile(filepath.Join(out, "hello"))
	require.NoError(t, err)
	require.Equal(t, "world", string(got))
}

const busyboxStage = "FROM scratch AS base\nCOPY busybox /bin/busybox\nCOPY busybox /bin/sh\nENV PATH=/bin\n"

func TestEveryClassRunsSteps(t *testing.T) {
	for _, class := range sandbox.Classes {
		t.Run(string(class), func(t *testing.T) {
			c := newTestEngine(t, class)
			out, log, err := build(t, c, busyboxStage+`RUN busybox echo hello-from-step && busybox mkdir /out && busybox cat /proc/version > /out/version
RUN busybox cat /proc/self/uid_map > /out/uid_map && busybox rm /bin/sh
`, nil, nil)
			require.NoError(t, err)
			require.Contains(t, log, "hello-from-step")
			require.NoFileExists(t, filepath.Join(out, "bin/sh"))
			version, err := os.ReadFile(filepath.Join(out, "out/version"))
			require.NoError(t, err)
			require.Equal(t, class == sandbox.GVisor, bytes.Contains(version, []byte("gvisor")), "%s", version)
			if class == sandbox.Userns {
				ids, err := os.ReadFile(filepath.Join(out, "out/uid_map"))
				require.NoError(t, err)
				fields := strings.Fields(string(ids))
				require.Equal(t, "65536", fields[2])
				require.NotEqual(t, "0", fields[1], "root of the step is not root of the node")
			}
		})
	}
}

func TestFailedStepTellsItsExitCode(t *testing.T) {
	for _, class := range sandbox.Classes {
		t.Run(string(class), func(t *testing.T) {
			_, _, err := build(t, newTestEngine(t, class), busyboxStage+"RUN exit 42\n", nil, nil)
			require.ErrorContains(t, err, "exit code: 42")
		})
	}
}

// TestDockerfileThatGrowsIsRefused has Dockerfiles that would take all memory of the process.
func TestDockerfileThatGrowsIsRefused(t *testing.T) {
	c := newTestEngine(t, sandbox.GVisor)
	double := strings.Repeat("ENV A=$A$A\n", 60)
	for _, tt := range []struct{ text, want string }{
		{"FROM scratch\nENV A=x\n" + double, "Dockerfile line 6: the value of A"},
		{"# syntax=docker/dockerfile:1\nFROM scratch\nARG A\n" + double, "Dockerfile line 7: the value of A"},
		{"FROM scratch AS base\nENV A=$LONG\nONBUILD ENV B=$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A\nFROM base", "the value of B"},
	} {
		_, _, err := build(t, c, tt.text, nil, map[string]string{"build-arg:A": strings.Repeat("a", 100_000), "build-arg:LONG": strings.Repeat("a", 100_000)})
		require.ErrorContains(t, err, tt.want)
	}
}

func TestSyntaxLineOfDockerIsBuiltIn(t *testing.T) {
	c := newTestEngine(t, sandbox.GVisor)
	for _, syntax := range []string{"docker/dockerfile:1", "docker/dockerfile:1.99-labs", "docker.io/docker/dockerfile-upstream:master"} {
		_, _, err := build(t, c, "# syntax="+syntax+"\nFROM scratch\nCOPY a /a\n", map[string]string{"a": ""}, nil)
		require.NoError(t, err, syntax)
	}
}

func TestOtherFrontendsAreRefused(t *testing.T) {
	c := newTestEngine(t, sandbox.GVisor)
	for _, syntax := range []string{"evil.example/dockerfile:1", "docker.io/docker/other", "localhost:5000/docker/dockerfile"} {
		_, _, err := build(t, c, "# syntax="+syntax+"\nFROM scratch\nCOPY a /a\n", map[string]string{"a": ""}, nil)
		require.ErrorContains(t, err, "is not allowed", syntax)
	}
	_, err := New(context.Background(), Config{NodeConfig: NodeConfig{Root: filepath.Join(t.TempDir(), "private"), Frontends: []string{"some/frontend:tag"}}})
	require.ErrorContains(t, err, "with a digest")
}
