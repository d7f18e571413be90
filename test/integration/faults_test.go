package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func unmarshal(t *testing.T, data []byte, v any) {
	t.Helper()
	require.NoError(t, json.Unmarshal(data, v))
}

func TestBadInputIsRefusedWithItsPlace(t *testing.T) {
	n := newNode(t, "gvisor")
	for name, c := range map[string]struct {
		dockerfile string
		args       []string
		code       int
		message    string
	}{
		"failing step":        {base + "RUN echo before && exit 42\n", withTools(t), 1, "exit code: 42"},
		"failing step's line": {base + "RUN exit 42\n", withTools(t), 1, "Dockerfile:7"},
		"unknown instruction": {"FROM scratch\nRUNN x\n", nil, 1, "unknown instruction: RUNN"},
		"cyclic stages":       {"FROM b AS a\nFROM a AS b\nCOPY --from=a / /\n", nil, 1, "Dockerfile:"},
		"NUL bytes":           {"FROM scratch\nRUN \x00\n", nil, 1, ""},
		"a line of 1 MB":      {"FROM scratch\nRUN " + strings.Repeat("x", 1<<20) + "\n", nil, 1, "line"},
		"host network":        {"FROM scratch\n", []string{"--network", "host"}, 2, "host"},
		"unknown flag":        {"FROM scratch\n", []string{"--privileged"}, 2, "--privileged"},
		"entitlement":         {"FROM scratch\n", []string{"--allow", "security.insecure"}, 2, "--allow"},
		"unknown sandbox":     {"FROM scratch\n", []string{"--sandbox", "none"}, 2, "gvisor"},
		"unknown target":      {"FROM scratch\n", []string{"--target", "nowhere"}, 1, "nowhere"},
		"load":                {"FROM scratch\n", []string{"--load"}, 2, "type=docker"},
		"security insecure":   {"# syntax=docker/dockerfile:1-labs\n" + base + "RUN --security=insecure true\n", withTools(t), 1, "insecure"},
		"network host in RUN": {base + "RUN --network=host true\n", withTools(t), 1, "network.host"},
	} {
		t.Run(name, func(t *testing.T) {
			r := n.build(contextDir(t, c.dockerfile, nil), c.args...)
			require.Equal(t, c.code, r.code, r.stderr)
			require.Contains(t, r.stderr, c.message)
			require.NotContains(t, r.stderr, "goroutine ")
		})
	}
	r := n.build("/does/not/exist")
	require.Equal(t, 2, r.code)
	require.Contains(t, r.stderr, "/does/not/exist")
	r = n.build(contextDir(t, "FROM scratch\nCOPY a /\n", map[string]string{"a": "", ".dockerignore": "!\n"}))
	require.Equal(t, 1, r.code)
	require.Contains(t, r.stderr, "exclusion pattern")
	n.mustBuild(contextDir(t, "FROM scratch\nCOPY a /\n", map[string]string{"a": "", ".dockerignore": strings.Repeat("**/", 50) + "x\n../../../etc\n"}))
}

// interrupt starts a build, sends SIGINT after a while and returns how it ended.
func (n *node) interrupt(after time.Duration, dir string, args ...string) result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	var errOut bytes.Buffer
	cmd := n.command(ctx, append(append([]string{"build", "--root", n.root, "--sandbox", n.class, "--progress", "plain"}, args...), dir)...)
	cmd.Stderr = &errOut
	require.NoError(n.t, cmd.Start())
	time.Sleep(after)
	require.NoError(n.t, cmd.Process.Signal(syscall.SIGINT))
	_ = cmd.Wait()
	require.NoError(n.t, ctx.Err(), errOut.String())
	return result{code: cmd.ProcessState.ExitCode(), stderr: errOut.String()}
}

// startSleep starts a build whose step sleeps, and returns when it does.
func (n *node) startSleep(ctx context.Context) (*exec.Cmd, *syncBuffer) {
	n.t.Helper()
	dir := contextDir(n.t, base+"RUN echo now-asleep && (sleep 1000 & sleep 1000)\n", nil)
	out := &syncBuffer{}
	cmd := n.command(ctx, append(append([]string{"build", "--root", n.root, "--sandbox", n.class, "--progress", "plain"}, withTools(n.t)...), dir)...)
	cmd.Stderr = out
	require.NoError(n.t, cmd.Start())
	started := func() bool { return strings.Contains(out.String(), " now-asleep\n") }
	for deadline := time.Now().Add(time.Minute); !started(); time.Sleep(20 * time.Millisecond) {
		require.True(n.t, time.Now().Before(deadline), "the step does not start:\n%s", out)
	}
	return cmd, out
}

func TestInterruptStopsTheStepWithinASecond(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, n *node) {
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		defer cancel()
		cmd, out := n.startSleep(ctx)
		start := time.Now()
		require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
		_ = cmd.Wait()
		// The second that is promised, and one for a machine that does more.
		require.Less(t, time.Since(start), 2*time.Second, out.String())
		require.NotZero(t, cmd.ProcessState.ExitCode())
		n.mustBuild(contextDir(t, base+"RUN true\n", nil), withTools(t)...)
	})
}

func TestKilledBuildLeavesNothingAfterTheNext(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, n *node) {
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		defer cancel()
		cmd, _ := n.startSleep(ctx)
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		n.mustBuild(contextDir(t, base+"RUN echo next\n", nil), withTools(t)...)
	})
}

func TestSecondBuildWaitsAndSaysForWhom(t *testing.T) {
	n := newNode(t, "userns")
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	first, _ := n.startSleep(ctx)
	dir := contextDir(t, "FROM scratch\nCOPY a /\n", map[string]string{"a": ""})
	out := &syncBuffer{}
	second := n.command(ctx, "build", "--root", n.root, "--progress", "plain", dir)
	second.Stderr = out
	require.NoError(t, second.Start())
	require.Eventually(t, func() bool { return strings.Contains(out.String(), "in use by process ") }, 10*time.Second, 20*time.Millisecond)
	require.NoError(t, first.Process.Signal(syscall.SIGINT))
	_ = first.Wait()
	require.NoError(t, second.Wait(), out.String())
}

func TestFullDiskFailsOneBuild(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, n *node) {
		dir := t.TempDir()
		image, mount := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
		require.NoError(t, os.Mkdir(mount, 0o755))
		run := func(args ...string) {
			out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
			require.NoError(t, err, "%q: %s", args, out)
		}
		run("truncate", "-s", "96M", image)
		run("mkfs.ext4", "-q", image)
		run("mount", "-o", "loop", image, mount)
		defer run("umount", mount)
		n.root = filepath.Join(mount, "state")
		tools := withTools(t)
		r := n.build(contextDir(t, base+"RUN dd if=/dev/zero of=/big bs=1048576 count=200\n", nil), tools...)
		require.Equal(t, 1, r.code, r.stderr)
		require.Contains(t, strings.ToLower(r.stderr), "no space left")
		n.mustBuild(contextDir(t, base+"RUN echo small > /small\n", nil), tools...)
	})
}

func TestDiskUsagePruneAndDoctor(t *testing.T) {
	n := newNode(t, "gvisor")
	n.mustBuild(contextDir(t, base+"RUN echo kept > /f\n", nil), withTools(t)...)
	r := n.kiln("", "du", "--root", n.root)
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stdout, "Total")
	r = n.kiln("", "prune", "--root", n.root, "--all", "--force")
	require.Zero(t, r.code, r.stderr)
	entries, err := filepath.Glob(filepath.Join(n.root, "store/snapshots/snapshots/*"))
	require.NoError(t, err)
	require.Empty(t, entries, "prune --all leaves no snapshot")
	r = n.kiln("", "doctor", "--root", n.root)
	require.Zero(t, r.code, r.stdout+r.stderr)
}
