// Package integration runs the kiln that the Makefile built as its users do, with
// real OCI runtimes and a real registry.
package integration

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/sandbox"
)

// classes are the sandboxes that every behaviour is shown in.
var classes = []string{"gvisor", "userns"}

// commandTimeout bounds one run of kiln.
const commandTimeout = 3 * time.Minute

var repo = func() string {
	dir, err := filepath.Abs("../..")
	if err != nil {
		panic(err)
	}
	return dir
}()

func bin(name string) string { return filepath.Join(repo, "bin", name) }

// node is one state directory with the sandbox that builds in it use.
type node struct {
	t     *testing.T
	root  string
	class string
	env   []string
}

func newNode(t *testing.T, class string) *node {
	t.Helper()
	root := t.TempDir()
	takeCensus(t, root)
	return &node{t: t, root: root, class: class}
}

type result struct {
	code           int
	stdout, stderr string
}

func (n *node) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, bin("kiln"), args...)
	cmd.Env = append(os.Environ(), append([]string{"DOCKER_CONFIG=" + n.root + "/no-config"}, n.env...)...)
	return cmd
}

// kiln runs a command in the node's state directory.
func (n *node) kiln(stdin string, args ...string) result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := n.command(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	require.NoError(n.t, ctx.Err(), "kiln %q did not end: %s", args, errOut.String())
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		n.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// build runs kiln build in dir with plain progress.
func (n *node) build(dir string, args ...string) result {
	n.t.Helper()
	all := append([]string{"build", "--root", n.root, "--sandbox", n.class, "--progress", "plain"}, args...)
	return n.kiln("", append(all, dir)...)
}

func (n *node) mustBuild(dir string, args ...string) result {
	n.t.Helper()
	r := n.build(dir, args...)
	require.Zero(n.t, r.code, r.stderr)
	return r
}

// mustBuildTree builds and returns the resulting files.
func (n *node) mustBuildTree(dir string, args ...string) string {
	n.t.Helper()
	out := filepath.Join(n.t.TempDir(), "out")
	n.mustBuild(dir, append(args, "-o", "type=local,dest="+out)...)
	return out
}

// base is the start of a Dockerfile: a stage called base with busybox in it.
const base = `FROM scratch AS base
COPY --from=tools busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
ENV PATH=/bin
RUN ["/bin/busybox", "--install", "-s", "/bin"]
FROM base
`

// contextDir writes a Dockerfile and files into a new directory. The Dockerfile
// may use the named context tools, which withTools gives.
func contextDir(t *testing.T, dockerfile string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, "Dockerfile", dockerfile)
	for name, content := range files {
		write(t, dir, name, content)
	}
	return dir
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func read(t *testing.T, parts ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(parts...))
	require.NoError(t, err)
	return strings.TrimSpace(string(data))
}

// withTools gives a Dockerfile Debian's static busybox.
func withTools(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	data, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "Debian's busybox-static is missing; run `make deps`")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "busybox"), data, 0o755))
	return []string{"--build-context", "tools=" + dir}
}

// takeCensus wants the node to hold nothing after the test that it did not hold before.
func takeCensus(t *testing.T, root string) {
	t.Helper()
	before := census(t, root)
	t.Cleanup(func() {
		// The kernel takes network devices away some milliseconds after their
		// namespace's last descriptor is closed.
		var left []string
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			if left = more(census(t, root), before); len(left) == 0 {
				return
			}
		}
		require.Empty(t, left, "something is left on the node")
	})
}

// more returns what of after is not in before. What was left by others may go meanwhile.
func more(after, before []string) (out []string) {
	before = slices.Clone(before)
	for _, have := range after {
		if i := slices.Index(before, have); i >= 0 {
			before = slices.Delete(before, i, i+1)
		} else {
			out = append(out, have)
		}
	}
	return out
}

// census lists mounts, network devices, packet-filter tables, cgroups, and the
// processes that have to do with the state directory root.
func census(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		out = append(out, "mount "+strings.Fields(line)[4])
	}
	steps := engine.StepsDir(root, sandbox.Userns)
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	for _, p := range procs {
		cmdline, err := os.ReadFile(p)
		if err == nil && (bytes.Contains(cmdline, []byte(root)) || bytes.Contains(cmdline, []byte(steps))) {
			out = append(out, fmt.Sprintf("process %s %q", filepath.Dir(p), cmdline))
		}
	}
	devices, err := net.Interfaces()
	require.NoError(t, err)
	for _, d := range devices {
		out = append(out, "device "+d.Name)
	}
	tables, err := exec.Command("nft", "list", "tables").Output()
	require.NoError(t, err, "Debian's nftables is missing; run `make deps`")
	for line := range strings.Lines(string(tables)) {
		out = append(out, "nft "+strings.TrimSpace(line))
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup/*/*", "/sys/fs/cgroup/*/kiln/*"} {
		dirs, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, d := range dirs {
			if st, err := os.Stat(d); err == nil && st.IsDir() && filepath.Base(d) != "kiln" {
				out = append(out, "cgroup "+d)
			}
		}
	}
	sort.Strings(out)
	return out
}
