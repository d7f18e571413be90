package gvisor

import (
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/netns/netnstest"
)

func TestNetworkEgress(t *testing.T) {
	if !netnstest.InNode(t) {
		return
	}
	netnstest.World(t)
	e := newEnv(t)
	for _, applet := range []string{"nc", "nslookup", "grep"} {
		if err := os.Symlink("busybox", e.lower+"/bin/"+applet); err != nil {
			require.ErrorIs(t, err, os.ErrExist)
		}
	}
	e.r.cfg.Networks = netnstest.Networks(t, netnstest.Allow(t))
	for _, c := range netnstest.Cases {
		t.Run(c.Name, func(t *testing.T) {
			step := e.step(netnstest.Try(append(slices.Clone(c.Yes), c.No...)...))
			step.Network = sandbox.NetworkEgress
			step.ExtraHosts = []sandbox.HostEntry{{Name: "extra", IP: netip.MustParseAddr("192.0.2.7")}}
			if c.Allow != nil {
				step.Egress = netnstest.Allow(t, c.Allow...)
			}
			got, res := e.run(step)
			for _, d := range c.Yes {
				require.Contains(t, got, "yes "+d+"\n")
			}
			for _, d := range c.No {
				require.Contains(t, got, "no "+d+"\n")
			}
			require.NotEmpty(t, append(res.Network.Reached.List, res.Network.Refused.List...))
		})
	}
}
