package escape

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
)

var _ = register(entry{
	ID: "fault/one-root", Severity: takesNodeDown,
	Threat: "Two processes use one state directory at once: agents, or `kiln build`, also when the first is killed.",
	Test:   oneRoot,
	Off: func(t *testing.T, e *env) bool {
		dir := e.dir(t)
		e.agentFiles(t, dir, "")
		e.startAgent(t, dir)
		require.NoError(t, os.Remove(filepath.Join(dir, "root/lock")))
		code, said := e.secondAgent(t, dir)
		t.Logf("without the lock: %d, %s", code, said)
		return !strings.Contains(said, "in use by")
	},
	Without: "the lock, which is taken away under the first agent",
})

// secondAgent starts one more agent with the state and another socket, and returns how
// it ended, at the latest after a while.
func (e *env) secondAgent(t *testing.T, dir string) (code int, said string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, agenttest.RepoBin(t, "kiln-agent"), "--config", filepath.Join(dir, "agent.yaml"), "--listen", "unix://"+dir+"/second")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	return cmd.ProcessState.ExitCode(), string(out)
}

// oneRoot has other processes come while an agent builds. Each is told who has the
// directory, and the agent's build does not notice.
func oneRoot(t *testing.T, e *env) {
	dir := e.dir(t)
	e.agentFiles(t, dir, "")
	ctx := agenttest.Context(t, attacker)
	p := e.startAgent(t, dir)
	running := p.begin(t, ctx, busybox+"RUN echo it runs; /bin/busybox sleep 12\n", nil)
	p.until(t, ctx, running, "it runs")
	holder := fmt.Sprintf("in use by process %d (kiln-agent)", p.cmd.Process.Pid)

	code, said := e.secondAgent(t, dir)
	require.Equal(t, 1, code, said)
	require.Contains(t, said, holder)

	// kiln build waits, and can be told not to.
	files := e.dir(t)
	require.NoError(t, os.WriteFile(filepath.Join(files, "Dockerfile"), []byte("FROM scratch\nCOPY Dockerfile /\n"), 0o644))
	first := e.kilnBuild(t, dir, files)
	first.says(t, holder)
	require.NoError(t, first.cmd.Process.Signal(syscall.SIGINT))
	require.Error(t, first.cmd.Wait())
	p.succeeds(t, ctx, running)

	// Two wait; the agent is killed, and they build one after the other.
	two := []*cli{e.kilnBuild(t, dir, files), e.kilnBuild(t, dir, files)}
	for _, c := range two {
		c.says(t, holder)
	}
	p.end(syscall.SIGKILL)
	for _, c := range two {
		require.NoError(t, c.cmd.Wait(), c.out.String())
	}
	after := e.startAgent(t, dir)
	after.succeeds(t, ctx, after.begin(t, ctx, busybox+"RUN echo after\n", nil))
}

// cli is a kiln build that runs.
type cli struct {
	cmd *exec.Cmd
	out output
}

// kilnBuild builds files with the agent's state directory.
func (e *env) kilnBuild(t *testing.T, dir, files string) *cli {
	t.Helper()
	c := &cli{cmd: exec.Command(agenttest.RepoBin(t, "kiln"), "build", "--root", filepath.Join(dir, "root"), "--sandbox", string(e.Class), "--progress", "plain", files)}
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.out
	require.NoError(t, c.cmd.Start())
	t.Cleanup(func() { _ = c.cmd.Process.Kill() })
	return c
}

// says waits until the command has said so.
func (c *cli) says(t *testing.T, text string) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Contains(c.out.String(), text) }, 20*time.Second, 20*time.Millisecond, "it does not say %q: %s", text, &c.out)
}
