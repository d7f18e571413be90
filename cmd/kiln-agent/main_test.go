package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/config"
)

// idleGoal is what an idle agent may occupy, in bytes. The race detector's share is
// large, so the goal of 100 MiB is that of a program without it.
const idleGoal = 100 << 20 * raceFactor

func metric(t *testing.T, page, name string) float64 {
	t.Helper()
	for line := range strings.Lines(page) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
			require.NoError(t, err)
			return f
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

// runOnce runs the command to its end.
func runOnce(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := command(t, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run()
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	require.NoError(t, os.WriteFile(bad, []byte("apiVersion: config.kiln.build/v1alpha1\nkind: AgentConfiguration\nlisteners: {tcp: {adress: x}}\n"), 0o600))
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"unknown flag", []string{"--nope"}, "--nope"},
		{"argument", []string{"serve"}, `unexpected argument "serve"`},
		{"no such file", []string{"--config", dir + "/none"}, "no such file"},
		{"unknown field", []string{"--config", bad}, `unknown field "listeners.tcp.adress"`},
		{"bad address", []string{"--listen", "localhost:1"}, "--listen"},
		{"TCP without TLS", []string{"--listen", "tcp://0.0.0.0:1"}, "listeners.tcp.tls"},
		{"bad level", []string{"--log-level", "loud"}, "logging.level"},
		{"relative root", []string{"--root", "x"}, "root"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := runOnce(t, tt.args...)
			require.Equal(t, exitUsage, code)
			require.Empty(t, stdout)
			require.Contains(t, stderr, tt.want)
		})
	}
	code, stdout, _ := runOnce(t, "--version")
	require.Equal(t, exitOK, code)
	require.Contains(t, stdout, "kiln-agent version")
}

func TestFlagsOverrideTheFile(t *testing.T) {
	dir := t.TempDir()
	code, stdout, stderr := runOnce(t, "--config", configure(t, dir, "", "logging: {level: warn, format: text}\n"),
		"--root", "/other", "--listen", "unix:///x.sock", "--node-name", "n2", "--v", "4", "--log-format", "json", "--print-config")
	require.Equal(t, exitOK, code, stderr)
	cfg, err := config.Decode([]byte(stdout))
	require.NoError(t, err)
	require.NoError(t, cfg.Complete())
	require.Equal(t, "/other", cfg.Root)
	require.Equal(t, "/x.sock", cfg.Listeners.Unix.Path)
	require.Equal(t, "n2", cfg.NodeName)
	require.Equal(t, config.Logging{Level: "debug", Format: "json"}, cfg.Logging)
	require.Equal(t, 2, cfg.Builds.Slots)
	again, err := cfg.Encode()
	require.NoError(t, err)
	require.Equal(t, stdout, string(again))
}

// TestRootIsForOneAgent starts a second one.
func TestRootIsForOneAgent(t *testing.T) {
	dir := t.TempDir()
	cfg := configure(t, dir, "", "")
	p := start(t, dir, cfg)
	code, _, stderr := runOnce(t, "--config", cfg)
	require.Equal(t, exitFailed, code)
	require.Contains(t, stderr, "in use by process "+strconv.Itoa(p.cmd.Process.Pid))
}

// TestNoSandbox starts an agent on a node that can run no step.
func TestNoSandbox(t *testing.T) {
	dir := t.TempDir()
	cfg := filepath.Join(dir, "c.yaml")
	require.NoError(t, os.WriteFile(cfg, []byte("apiVersion: config.kiln.build/v1alpha1\nkind: AgentConfiguration\nroot: "+dir+"/root\nsandboxes: {enabled: [gvisor], runscPath: /does/not/exist}\n"), 0o600))
	code, _, stderr := runOnce(t, "--config", cfg, "--listen", "unix://"+dir+"/s")
	require.Equal(t, exitFailed, code)
	require.Contains(t, stderr, "no sandbox that is enabled works on this node")
	require.Contains(t, stderr, "sandbox gvisor: runsc: /does/not/exist")
	require.NoFileExists(t, dir+"/s")
}

func TestCgroupMemory(t *testing.T) {
	tests := []struct {
		name  string
		proc  string
		files map[string]string
		want  int64
	}{
		{"v2", "0::/kubepods/pod1\n", map[string]string{"kubepods/pod1/memory.max": "1000\n", "kubepods/memory.max": "max\n"}, 1000},
		{"v2, parent is tighter", "0::/a/b\n", map[string]string{"a/b/memory.max": "1000\n", "a/memory.max": "500\n"}, 500},
		{"v2, path of the node", "0::/kubepods/pod1\n", map[string]string{"memory.max": "700\n"}, 700},
		{"v1", "5:cpu:/x\n4:memory:/x\n0::/\n", map[string]string{"memory/x/memory.limit_in_bytes": "900\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}, 900},
		{"no limit", "0::/\n", map[string]string{"memory.max": "max\n"}, 0},
		{"v1 without limit", "4:memory:/\n", map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0},
		{"dots", "0::/../../x\n", map[string]string{"memory.max": "700\n"}, 700},
		{"rubbish", "::\nx\n0::/\n", map[string]string{"memory.max": "-5\n"}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range tt.files {
				require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, "cg", name)), 0o755))
				require.NoError(t, os.WriteFile(filepath.Join(dir, "cg", name), []byte(content), 0o600))
			}
			require.NoError(t, os.WriteFile(filepath.Join(dir, "proc"), []byte(tt.proc), 0o600))
			got, ok := cgroupMemory(filepath.Join(dir, "proc"), filepath.Join(dir, "cg"))
			require.Equal(t, tt.want != 0, ok)
			if ok {
				require.Equal(t, tt.want, got)
			}
		})
	}
	require.Positive(t, nodeMemory())
}
