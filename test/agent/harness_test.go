package agent

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// metricsAddress is on the loopback device of a node.
const metricsAddress = "127.0.0.1:9131"

// node is a state directory, and a network namespace that is the node's for its
// agents: nobody else makes devices or packet filters in it.
type node struct {
	dir, socket, config string
	netns               string
	// seen are the processes that agents have had, by ID with the time of start, and
	// cgroups are those of their sandboxes.
	seen, cgroups map[string]bool
}

func newNode(t *testing.T, slots int) *node {
	t.Helper()
	return newNodeOf(t, slots, "userns")
}

// newNodeOf makes a node with classes of sandboxes, of which the first is the default.
// With several, steps have a limit of 256 processes.
// Its agents serve metrics on metricsAddress of its network.
func newNodeOf(t *testing.T, slots int, classes ...string) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{
		dir: dir, socket: filepath.Join(dir, "s"), config: filepath.Join(dir, "agent.yaml"),
		seen: map[string]bool{}, cgroups: map[string]bool{},
	}
	builds, tenants := "", ""
	if len(classes) > 1 {
		tenants = "tenants: {defaults: {defaultResources: {pids: 256}, maxResources: {pids: 256}, buildKitClients: allow}}\n"
	}
	if slots > 0 {
		builds = fmt.Sprintf("slots: %d, ", slots)
	}
	require.NoError(t, os.WriteFile(n.config, fmt.Appendf(nil, `apiVersion: config.kiln.build/v1alpha1
kind: AgentConfiguration
root: %s/root
nodeName: node-1
listeners: {unix: {path: %s}}
sandboxes: {default: %s, enabled: [%s]}
builds: {%sminFreeDisk: 10Mi}
records: {maxBuilds: 5000, maxBuildsPerTenant: 5000}
gc: {reserved: 5Gi, maxUsed: 10Gi, minFree: 10Mi}
metrics: {address: %q}
health: {address: "0"}
%s`, dir, n.socket, classes[0], strings.Join(classes, ", "), builds, metricsAddress, tenants), 0o600))

	holder := exec.Command("unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep 3600")
	holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := holder.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, holder.Start())
	t.Cleanup(func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	})
	_, err = out.Read(make([]byte, 8))
	require.NoError(t, err, "make a network namespace; run `make deps`")
	n.netns = fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid)
	return n
}

// agent is an agent in a process of its own.
type agent struct {
	agentv1.BuildServiceClient
	node  *node
	cmd   *exec.Cmd
	conn  *grpc.ClientConn
	ended bool
}

// start runs an agent and waits until it answers.
func (n *node) start(t *testing.T) *agent {
	t.Helper()
	cmd := exec.Command("nsenter", "--net="+n.netns, agenttest.RepoBin(t, "kiln-agent"), "--config", n.config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.OpenFile(filepath.Join(n.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	require.NoError(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	a := &agent{node: n, cmd: cmd}
	t.Cleanup(func() {
		a.end(t, syscall.SIGKILL)
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("end of the agents' log:\n%s", text[max(0, len(text)-8000):])
		}
	})
	a.conn, err = grpc.NewClient("unix:"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
	require.NoError(t, err)
	a.BuildServiceClient = agentv1.NewBuildServiceClient(a.conn)
	require.Eventually(t, func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		a.conn.ResetConnectBackoff()
		_, err := a.GetInfo(ctx, &agentv1.GetInfoRequest{})
		return err == nil
	}, time.Minute, 10*time.Millisecond, "the agent does not answer")
	return a
}

// end sends the agent a signal and waits for its end.
func (a *agent) end(t *testing.T, s syscall.Signal) {
	t.Helper()
	if a.ended {
		return
	}
	a.ended = true
	a.node.look()
	require.NoError(t, a.cmd.Process.Signal(s))
	_ = a.cmd.Wait()
	if a.conn != nil {
		_ = a.conn.Close()
	}
}

// look notes the processes below this one, and their cgroups.
func (n *node) look() {
	parents, starts := map[int]int{}, map[int]string{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if parent, start, ok := status(pid); ok {
			parents[pid], starts[pid] = parent, start
		}
	}
	for pid := range parents {
		below := false
		for p := pid; p > 1 && !below; p = parents[p] {
			below = parents[p] == os.Getpid() && !strings.HasPrefix(n.netns, fmt.Sprintf("/proc/%d/", p))
		}
		if !below {
			continue
		}
		n.seen[fmt.Sprintf("%d %s", pid, starts[pid])] = true
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		for line := range strings.Lines(string(text)) {
			_, path, _ := strings.Cut(strings.TrimSpace(line), ":")
			_, path, _ = strings.Cut(path, ":")
			if name, ok := strings.CutPrefix(path, "/kiln/"); ok {
				parts := strings.Split(name, "/")
				if parts[0] == "gvisor" && len(parts) > 1 { // which all agents of the machine share
					parts = []string{parts[0] + "/" + parts[1]}
				}
				n.cgroups[parts[0]] = parts[0] != "gvisor"
			}
		}
	}
}

// status returns the parent of a process and when it started; ok is false when it
// has ended.
func status(pid int) (parent int, start string, ok bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, found := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	if err != nil || !found || len(f) < 20 || f[0] == "Z" {
		return 0, "", false
	}
	parent, err = strconv.Atoi(f[1])
	return parent, f[19], err == nil
}

// left lists what agents have left on the node: mounts, processes, cgroups, network
// devices and packet filters. A range of user IDs is held by a lock, and so by a
// process.
func (n *node) left(t *testing.T) []string {
	t.Helper()
	var out []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, n.dir) {
			out = append(out, "mount "+strings.TrimSpace(line))
		}
	}
	for p := range n.seen {
		pid, start, _ := strings.Cut(p, " ")
		id, _ := strconv.Atoi(pid)
		if _, now, ok := status(id); ok && now == start {
			cmdline, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			out = append(out, fmt.Sprintf("process %s %q", pid, cmdline))
		}
	}
	for name, own := range n.cgroups {
		if !own {
			continue
		}
		dirs, err := filepath.Glob("/sys/fs/cgroup/*/kiln/" + name)
		require.NoError(t, err)
		more, err := filepath.Glob("/sys/fs/cgroup/kiln/" + name)
		require.NoError(t, err)
		out = append(out, append(dirs, more...)...)
	}
	for _, list := range [][]string{{"ip", "-o", "link"}, {"nft", "list", "tables"}} {
		text, err := exec.Command("nsenter", append([]string{"--net=" + n.netns}, list...)...).Output()
		require.NoError(t, err, "run `make deps`")
		for line := range strings.Lines(string(text)) {
			if !strings.Contains(line, " lo: ") {
				out = append(out, strings.TrimSpace(line))
			}
		}
	}
	sort.Strings(out)
	return out
}

// checkNothingLeft waits a moment for what the kernel takes away late.
func (n *node) checkNothingLeft(t *testing.T) {
	t.Helper()
	var out []string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if out = n.left(t); len(out) == 0 {
			return
		}
	}
	require.Empty(t, out, "left on the node")
}
