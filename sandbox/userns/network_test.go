package userns

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/netns/netnstest"
)

// oneNetwork hands out namespaces with nothing but a loopback device.
type oneNetwork struct{ ns *os.File }

func (*oneNetwork) Acquire(context.Context, sandbox.NetworkMode) (sandbox.Network, error) {
	n := &oneNetwork{}
	opened := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		opened <- err
	}()
	return n, <-opened
}

func (n *oneNetwork) Close() error { return nil }

func (n *oneNetwork) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.ns.Fd()) }

func (n *oneNetwork) Nameservers() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("192.0.2.53")}
}

func (n *oneNetwork) Restrict(*egress.Policy) error { return nil }

func (n *oneNetwork) Contacts() (sandbox.Contacts, error) { return sandbox.Contacts{}, nil }

func (n *oneNetwork) Unused() (bool, error) { return false, nil }

func (n *oneNetwork) Release() error { return n.ns.Close() }

func TestNetworkOfTheNode(t *testing.T) {
	census(t)
	cfg := testConfig(filepath.Join(openDir(t), "state"))
	cfg.Networks = &oneNetwork{}
	r, err := New(context.Background(), cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, r.Close()) }()
	step := newStep(t, "cat /etc/resolv.conf /etc/hosts; ls /sys/class/net; touch /sys/x 2>/dev/null || echo refused")
	step.Network = sandbox.NetworkEgress
	step.ExtraHosts = []sandbox.HostEntry{{Name: "db", IP: netip.MustParseAddr("192.0.2.7")}}
	out, code := run(t, r, step)
	require.Zero(t, code, out)
	require.Contains(t, out, "nameserver 192.0.2.53\n")
	require.Contains(t, out, "192.0.2.7\tdb\n")
	require.Contains(t, out, "\nlo\nrefused\n", "it sees the devices of its own network only, and cannot write")
}

func TestNetworkEgress(t *testing.T) {
	if !netnstest.InNode(t) {
		return
	}
	netnstest.World(t)
	cfg := testConfig(filepath.Join(openDir(t), "state"))
	cfg.Networks = netnstest.Networks(t, netnstest.Allow(t))
	r, err := New(context.Background(), cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, r.Close()) }()
	for _, c := range netnstest.Cases {
		t.Run(c.Name, func(t *testing.T) {
			step := newStep(t, netnstest.Try(append(slices.Clone(c.Yes), c.No...)...))
			step.Network = sandbox.NetworkEgress
			if c.Allow != nil {
				step.Egress = netnstest.Allow(t, c.Allow...)
			}
			var out bytes.Buffer
			step.Process.Stdout = &out
			res, err := r.Run(context.Background(), step, nil)
			require.NoError(t, err)
			for _, d := range c.Yes {
				require.Contains(t, out.String(), "yes "+d+"\n")
			}
			for _, d := range c.No {
				require.Contains(t, out.String(), "no "+d+"\n")
			}
			require.NotEmpty(t, append(res.Network.Reached.List, res.Network.Refused.List...))
		})
	}
}

func TestStepSeesNothingOfTheNode(t *testing.T) {
	r := newRuntime(t)
	out := sh(t, r, "cat /proc/self/cgroup | cut -d: -f3 | sort -u; ls /sys/fs/cgroup | wc -l; ls /proc | grep -c '^[0-9]'; cat /proc/1/cmdline | head -c 7; echo; dmesg 2>&1 | tail -1; ls /dev | tr '\\n' ' '")
	require.Regexp(t, `^/\n0\n\d\n/bin/sh\n.*Operation not permitted\nfd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero $`, out)
}
