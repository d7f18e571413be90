package gvisor

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/netns"
)

const nodeEnv = "KILN_TEST_GVISOR_NODE"

// TestNetworkEgress runs in a network namespace that plays the node, with another
// one behind it that plays the world.
func TestNetworkEgress(t *testing.T) {
	if os.Getenv(nodeEnv) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNetworkEgress$", "-test.v")
		cmd.Env = append(os.Environ(), nodeEnv+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		return
	}
	world := exec.Command("/bin/busybox", "sh", "-c", "echo up; read go; exec busybox nc -ll -p 80 -e busybox echo from-the-world")
	world.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	stdin, err := world.StdinPipe()
	require.NoError(t, err)
	stdout, err := world.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, startLocked(world))
	defer func() { _ = world.Process.Kill(); _ = world.Wait() }()
	_, err = bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	setup := fmt.Sprintf(`set -e
ip link set lo up; ip link add w0 type veth peer name w1; ip link set w1 netns %d
ip addr add 203.0.113.1/24 dev w0; ip link set w0 up; ip route add default via 203.0.113.2
nsenter -t %d -n sh -ec 'ip addr add 203.0.113.2/24 dev w1; ip link set w1 up'`, world.Process.Pid, world.Process.Pid)
	out, err := exec.Command("sh", "-c", setup).CombinedOutput()
	require.NoError(t, err, string(out))
	fmt.Fprintln(stdin, "go")

	e := newEnv(t)
	require.NoError(t, os.Symlink("busybox", e.lower+"/bin/nc"))
	nets, err := netns.New(context.Background(), netns.Config{StateDir: filepath.Join(t.TempDir(), "nets"), Nameservers: []netip.Addr{netip.MustParseAddr("203.0.113.53")}})
	require.NoError(t, err)
	defer func() { require.NoError(t, nets.Close()) }()
	e.r.cfg.Networks = nets
	for range 2 {
		step := e.step("cat /etc/resolv.conf /etc/hosts; for i in $(seq 20); do nc -w 1 203.0.113.2 80 </dev/null && exit 0; sleep 0.1; done; exit 9")
		step.Network = sandbox.NetworkEgress
		step.ExtraHosts = []sandbox.HostEntry{{Name: "extra", IP: netip.MustParseAddr("192.0.2.7")}}
		got := e.ok(step)
		require.Contains(t, got, "nameserver 203.0.113.53\n")
		require.Contains(t, got, "192.0.2.7\textra\n")
		require.Contains(t, got, "from-the-world\n")
	}
}
