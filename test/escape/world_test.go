package escape

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// Addresses of the world. Nothing leaves the namespaces of the tests.
const (
	// nodeAddress is the node's own, metadataAddress that of its cloud's metadata
	// service.
	nodeAddress     = "10.20.0.1"
	metadataAddress = "169.254.169.254"
	// outsideAddress is a host of the internet, which builds may reach.
	// nameserverAddress is the node's resolver; it is outside too.
	outsideAddress    = "203.0.113.7"
	nameserverAddress = "203.0.113.53"
	// allowedLoopback is an address of the node that an administrator lets builds
	// fetch from: servers of tests listen there, and speak plain HTTP.
	allowedLoopback = "127.0.0.2"
)

// Tenants. The attacker is one of them; the other is who it would like to reach.
const (
	attacker = "a"
	victim   = "b"
)

// world is a node with an agent and its surroundings. All entries share it.
type world struct {
	// t is the test of all entries.
	t *testing.T
	// Root is the state directory of the node.
	Root string
	Node *engine.Node
	// Agent is called as agenttest.Context says: by "a", "b" or "controller".
	Agent agentv1.BuildServiceClient

	// Canary is random; it is in CanaryFile, which only root may read, and in the
	// environment of the agent as CanaryEnv.
	Canary, CanaryFile string

	// temp is where entries have their files: the node's own are elsewhere.
	temp string
	// tools is a directory that is the root of attackers' images; see env.Build.
	tools string
	// outside is the network namespace of hosts that are not the node.
	outside *os.File
	// memos are results that several entries look at, see memo.
	memos map[string]any
}

// CanaryEnv is the variable of the agent's environment that has the canary.
const CanaryEnv = "KILN_TEST_CREDENTIAL"

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, Canary: random(t), memos: map[string]any{}, temp: t.TempDir()}
	w.network(t)
	// Builds see that name servers are those of the world.
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	require.NoError(t, os.WriteFile(resolv, []byte("nameserver "+nameserverAddress+"\n"), 0o644))
	require.NoError(t, unix.Mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH)) })

	private := filepath.Join(t.TempDir(), "private")
	require.NoError(t, os.Mkdir(private, 0o700))
	w.CanaryFile = filepath.Join(private, "canary")
	require.NoError(t, os.WriteFile(w.CanaryFile, []byte(w.Canary+"\n"), 0o400))
	t.Setenv(CanaryEnv, w.Canary)
	w.tools = makeTools(t)

	w.Root = filepath.Join(t.TempDir(), "root")
	w.neverCollect(t)
	w.Node = w.open(t, w.Root, func(c *engine.NodeConfig) {
		allowed, err := egress.ParseExceptions([]string{allowedLoopback})
		require.NoError(t, err)
		c.Fetch = &egress.Policy{Exceptions: allowed}
		c.CollectInterval = time.Hour // see neverCollect
	})
	w.Node.Warm(sandbox.Classes...)
	w.Agent = agenttest.Serve(t, agenttest.New(t, nodeengine.New(w.Node), func(c *agent.Config) { c.Root = w.Root }))
	return w
}

// neverCollect has engines believe that their caches were collected just now, and keeps
// them from measuring those: BuildKit races with itself when it is asked to meanwhile.
func (w *world) neverCollect(t *testing.T) {
	t.Helper()
	for _, tenant := range []string{attacker, victim} {
		for _, c := range sandbox.Classes {
			dir := filepath.Join(w.Root, "domains", tenant, string(c))
			require.NoError(t, os.MkdirAll(dir, 0o700))
			stamp := filepath.Join(dir, "collected")
			require.NoError(t, os.WriteFile(stamp, nil, 0o600))
		}
	}
}

// open opens a node of the test's own in dir. It is closed with the test.
func (w *world) open(t *testing.T, dir string, change func(*engine.NodeConfig)) *engine.Node {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir()) // the node changes it
	cfg := engine.NodeConfig{Root: dir, RunscPath: agenttest.RepoBin(t, "runsc")}
	if change != nil {
		change(&cfg)
	}
	n, err := engine.OpenNode(context.Background(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	return n
}

// dir returns a new directory, which is removed with the test.
func (w *world) dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(w.temp, "")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// random returns a string that nothing else has.
func random(t testing.TB) string {
	b := make([]byte, 16)
	_, err := rand.Read(b)
	require.NoError(t, err)
	return "canary" + hex.EncodeToString(b)
}

// network makes the node's devices, and a network outside that it is connected to.
func (w *world) network(t *testing.T) {
	t.Helper()
	ready := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread is in another namespace, and ends with the function
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			w.outside, err = os.Open("/proc/thread-self/ns/net")
		}
		ready <- err
	}()
	require.NoError(t, <-ready)
	t.Cleanup(func() { w.outside.Close() })
	for _, c := range strings.Split(`link set lo up
link add node0 type bridge
link add cloud0 type bridge
addr add `+nodeAddress+`/24 dev node0
addr add `+metadataAddress+`/32 dev cloud0
link set node0 up
link set cloud0 up
link add up0 type veth peer name down0
link set down0 netns /proc/self/fd/3
addr add 198.51.100.1/24 dev up0
link set up0 up`, "\n") {
		w.ip(t, false, c)
	}
	for _, c := range strings.Split(`link set lo up
addr add 198.51.100.2/24 dev down0
link set down0 up
addr add `+outsideAddress+`/32 dev lo
addr add `+nameserverAddress+`/32 dev lo`, "\n") {
		w.ip(t, true, c)
	}
	w.ip(t, false, "route add default via 198.51.100.2")
	t.Cleanup(func() {
		for _, d := range []string{"up0", "cloud0", "node0"} {
			w.ip(t, false, "link del "+d)
		}
	})
}

// ip runs iproute2 on the node, or outside; it has the namespace outside as its
// descriptor 3.
func (w *world) ip(t *testing.T, outside bool, args string) {
	t.Helper()
	cmd := exec.Command("ip", strings.Fields(args)...)
	if outside {
		cmd = exec.Command("nsenter", append([]string{"--net=/proc/self/fd/3", "ip"}, strings.Fields(args)...)...)
	}
	cmd.ExtraFiles = []*os.File{w.outside}
	msg, err := cmd.CombinedOutput()
	require.NoError(t, err, "ip %s: %s", args, msg)
}

// listen opens a TCP listener on the node, or in the network outside, on an address
// like "169.254.169.254:80". It is closed with the test.
func (w *world) listen(t *testing.T, outside bool, address string) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	if !outside {
		l, err = net.Listen("tcp", address)
	} else {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread()
			if err = unix.Setns(int(w.outside.Fd()), unix.CLONE_NEWNET); err == nil {
				l, err = net.Listen("tcp", address)
			}
		}()
		<-done
	}
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}
