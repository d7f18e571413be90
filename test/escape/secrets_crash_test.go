package escape

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

var _ = register(
	entry{
		ID: "secrets/crash-output", Severity: reachesTenant,
		Threat: "The agent crashes, is aborted or is killed while a step has a secret, which is in what it writes then, in a core file, or left on the disk.",
		Test: func(t *testing.T, e *env) {
			for _, s := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGSEGV, syscall.SIGKILL} {
				crashed(t, e, s)
			}
		},
		Off:     func(t *testing.T, e *env) bool { return crashed(t, e, 0) },
		Without: "that nothing writes the agent's memory: it is read here",
	},
	entry{
		ID: "secrets/core-dump", Severity: reachesTenant,
		Threat: "A program of a step crashes while it has a secret, and the kernel writes its memory into the layer, or gives it to a program of the node.",
		Test: func(t *testing.T, e *env) {
			secret := random(t)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN --mount=type=secret,id=s,env=S ulimit -c unlimited 2>/dev/null; echo limit $(ulimit -c); " + crash + "; ls -la / /tmp\n", Secrets: map[string]string{"s": secret}, Attrs: map[string]string{"ulimit": "core=1000000000:1000000000"}})
			require.Contains(t, r.Log, "it crashed", r.Log)
			require.Empty(t, r.Contains(secret))
			require.NotContains(t, r.Log, "limit unlimited")
			require.Empty(t, onDisk(t, e, secret))
		},
		Off: func(t *testing.T, e *env) bool {
			pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
			require.NoError(t, err)
			out := e.runRaw(t, raw{}, "/bin/sh", "-c", "ulimit -c unlimited; "+crash+"; ls -la /")
			// Where a program gets it there is nothing to see in the container.
			return strings.Contains(out, " core") || pattern[0] == '|'
		},
		Without: "the limit of core files",
	},
	entry{
		ID: "secrets/build-argument", Severity: reachesTenant,
		Threat: "A build argument, which is no secret but often taken for one, is in the log, a layer, an error or the name of a step.",
		Test: func(t *testing.T, e *env) {
			secret := random(t)
			for command, ok := range map[string]bool{"echo ${#S}": true, "echo > /written; exit 9": false} {
				r := e.Build(t, build{Dockerfile: "FROM tools\nARG S\nRUN " + command + "\n", Args: map[string]string{"S": secret}})
				require.Equal(t, ok, r.Err == nil, "%v", r.Err)
				require.Empty(t, r.Contains(secret))
			}
		},
		Without: copied,
		Off: func(t *testing.T, e *env) bool {
			secret := random(t)
			return e.MustBuild(t, build{Dockerfile: "FROM tools\nARG S\nRUN echo $S > /copied\n", Args: map[string]string{"S": secret}}).Contains(secret) != ""
		},
	},
)

// crash is a command whose shell dies as by a hole in it.
const crash = "(sh -c 'kill -SEGV $$'; [ $? -gt 128 ] && echo it crashed)"

// crashed has an agent end by a signal while a step has a secret, and looks for that. It
// tells whether the secret was in the agent's memory, which it reads when s is 0.
func crashed(t *testing.T, e *env, s syscall.Signal) (inMemory bool) {
	t.Helper()
	secret, password := random(t), random(t)
	dir := e.dir(t)
	e.agentFiles(t, dir, "")
	p := e.startAgent(t, dir)
	ctx := agenttest.Context(t, attacker)
	id := p.begin(t, ctx, busybox+"RUN --mount=type=secret,id=s --mount=type=secret,id=s,env=S echo it has ${#S}; /bin/busybox sleep 3\n", func(r *agentv1.StartBuildRequest) {
		r.Spec.Secrets = []*agentv1.SecretRef{{Id: "s"}}
		r.Credentials = &agentv1.Credentials{
			Secrets:    map[string][]byte{"s": []byte(secret)},
			Registries: map[string]*agentv1.RegistryCredential{"registry.example": {Username: "someone", Password: password}},
		}
	})
	p.until(t, ctx, id, fmt.Sprintf("it has %d", len(secret)))
	if s == 0 {
		return holds(t, p.cmd.Process.Pid, secret)
	}
	p.end(s)
	out := p.output(t)
	if s == syscall.SIGQUIT || s == syscall.SIGABRT {
		require.Contains(t, out, "goroutine ", "it says where it was")
	}
	// What was in memory of the agent's mount namespace goes with its last process.
	noProcess(t, dir)
	for _, c := range []string{secret, password} {
		checkText(t, "what the agent wrote", out, c)
		require.Empty(t, grep(dir, c), "after %v", s)
	}
	cores, err := filepath.Glob(filepath.Join(dir, "*core*"))
	require.NoError(t, err)
	require.Empty(t, cores)
	again := e.startAgent(t, dir)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, again.result(t, ctx, id).GetState())
	return false
}

// holds tells whether a text is in the memory of a process.
func holds(t *testing.T, pid int, text string) bool {
	t.Helper()
	maps, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/maps")
	require.NoError(t, err)
	mem, err := os.Open("/proc/" + strconv.Itoa(pid) + "/mem")
	require.NoError(t, err)
	defer mem.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") || ctx.Err() != nil {
			continue
		}
		data, _ := io.ReadAll(io.NewSectionReader(mem, from, min(to-from, 64<<20))) // parts may be missing
		if bytes.Contains(data, []byte(text)) {
			return true
		}
	}
	return false
}
