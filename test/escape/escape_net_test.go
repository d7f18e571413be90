package escape

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/netns"
)

var _ = register(
	reach("escape/metadata-service", "A step asks the cloud's metadata service for the node's credentials.", readsNode,
		func(t *testing.T, e *env) string { return e.oracle(t, metadataAddress+":0", nil).Address }),
	reach("escape/node-address", "A step connects to what listens on the node's addresses, such as kubelet and the agent.", readsNode,
		func(t *testing.T, e *env) string { return e.oracle(t, nodeAddress+":0", nil).Address }),
	reach("escape/node-upstream-address", "A step connects to the node by the address that it has towards the outside.", readsNode,
		func(t *testing.T, e *env) string { return e.oracle(t, "198.51.100.1:0", nil).Address }),
	entry{
		ID: "escape/node-loopback", Threat: "A step connects to what listens on the node's loopback, such as the agent's metrics.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			o := e.oracle(t, "127.0.0.1:0", nil)
			_, port, _ := strings.Cut(o.Address, ":")
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("tcp", "-", o.Address, "127.0.0.2:"+port, "0.0.0.0:"+port, "127.255.255.254:"+port), NoExport: true})
			require.NotContains(t, r.Log, "connected", r.Log)
			require.Empty(t, o.Requests())
		},
		Without: "a network namespace of its own",
		Off: func(t *testing.T, e *env) bool {
			o := e.oracle(t, "127.0.0.1:0", nil)
			return strings.Contains(e.runRaw(t, raw{Node: true, Netns: "/proc/self/ns/net"}, "/bin/attack", "tcp", "-", o.Address), "connected")
		},
	},
	entry{
		ID: "tenancy/step-network", Threat: "A step connects to what listens in a step of another tenant.",
		Severity: reachesTenant,
		Test: func(t *testing.T, e *env) {
			n := e.Neighbour(t)
			require.NotEmpty(t, n.Addresses)
			var to []string
			for _, a := range n.Addresses {
				to = append(to, a+":4000")
			}
			outside := e.outsideOracle(t, nil)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack(append([]string{"tcp", "-", outside.Address}, to...)...), NoExport: true})
			require.Equal(t, 1, strings.Count(r.Log, "connected to"), r.Log)
			r.CheckSecret(t, n.Canary)
			require.NotContains(t, n.Log(), "got a connection")
		},
	},
	entry{
		ID: "escape/forged-source", Threat: "A step sends from another address than its own, to be taken for the node or another step.",
		Severity: reachesTenant,
		Test: func(t *testing.T, e *env) {
			outside := e.outsideOracle(t, nil)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("tcp", nodeAddress, outside.Address) + attack("tcp", "10.63.255.9", outside.Address), NoExport: true})
			require.NotContains(t, r.Log, "connected", r.Log)
			require.Empty(t, outside.Requests())
		},
	},
	entry{
		ID: "escape/network-none", Threat: "A step that must have no network sends what it has to the outside.",
		Severity: slowsOthers,
		Test: func(t *testing.T, e *env) {
			outside := e.outsideOracle(t, nil)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN --network=none /bin/attack tcp - " + outside.Address + " " + nameserverAddress + ":53 " + nodeAddress + ":1\n", NoExport: true})
			require.NotContains(t, r.Log, "connected")
			require.Empty(t, outside.Requests())
		},
		Without: "--network=none", Off: func(t *testing.T, e *env) bool {
			outside := e.outsideOracle(t, nil)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("tcp", "-", outside.Address), NoExport: true})
			return strings.Contains(r.Log, "connected") && len(outside.Requests()) == 1
		},
	},
)

// reach is an entry about an address that no step may reach, while it reaches others.
func reach(id, threat string, s severity, listen func(t *testing.T, e *env) string) entry {
	return entry{
		ID: id, Threat: threat, Severity: s,
		Test: func(t *testing.T, e *env) {
			outside := e.outsideOracle(t, nil)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("tcp", "-", outside.Address, listen(t, e)), NoExport: true})
			require.Contains(t, r.Log, "connected to "+outside.Address, "its network works")
			require.Equal(t, 1, strings.Count(r.Log, "connected to"), r.Log)
		},
		Without: "the packet filter",
		Off: func(t *testing.T, e *env) bool {
			address := listen(t, e)
			return strings.Contains(e.runRaw(t, raw{Node: true, Netns: unfiltered(t)}, "/bin/attack", "tcp", "-", address), "connected to "+address)
		},
	}
}

// unfiltered makes a network of a step, and takes its packet filter away.
func unfiltered(t *testing.T) string {
	t.Helper()
	before := filters(t)
	m, err := netns.New(t.Context(), netns.Config{})
	require.NoError(t, err)
	// It misses the table when it closes, and still takes the rest away; the census tells.
	t.Cleanup(func() { _ = m.Close() })
	n, err := m.Acquire(t.Context(), sandbox.NetworkEgress)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Release()) })
	for _, table := range filters(t) {
		if !slices.Contains(before, table) {
			require.NoError(t, exec.Command("nft", append([]string{"delete"}, strings.Fields(table)...)...).Run())
		}
	}
	return n.Path()
}

// filters are the tables of packet filters, such as "table ip x".
func filters(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command("nft", "list", "tables").Output()
	require.NoError(t, err)
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}
