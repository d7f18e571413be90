package userns

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/netns/netnstest"
)

// chain makes steps of one build, each on what the one before has made.
type chain struct {
	t     *testing.T
	build string
	lower []string
}

// step returns the next step. It prints its network first. Its result becomes part of the chain.
func (c *chain) step(script string) *sandbox.Step {
	c.t.Helper()
	step := newStep(c.t, "exec 2>&1; readlink /proc/self/ns/net; "+script)
	if c.lower == nil {
		c.lower = step.Root.Lower
	}
	step.Build, step.Network, step.Root.Lower = c.build, sandbox.NetworkEgress, c.lower
	c.lower = append([]string{step.Root.Upper}, c.lower...)
	return step
}

// outcome runs a step, which ends with the given code, and returns its network and the rest of what it says.
func (c *chain) outcome(r *Runtime, step *sandbox.Step, code int) (network, rest string) {
	c.t.Helper()
	out, got := run(c.t, r, step)
	require.Equal(c.t, code, got, out)
	network, rest, _ = strings.Cut(out, "\n")
	require.Regexp(c.t, `^net:\[\d+\]$`, network)
	return network, rest
}

// heirs is how many sandboxes wait for a successor.
func heirs(r *Runtime) int {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	return len(r.pool.heirs)
}

func newNetworkRuntime(t *testing.T) *Runtime {
	t.Helper()
	cfg := testConfig(filepath.Join(openDir(t), "state"))
	cfg.Networks = netnstest.Networks(t, netnstest.Allow(t))
	r, err := New(context.Background(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

// TestSuccessorInheritsTheNetwork has steps of a build follow each other in one network and
// sandboxes of their own. What one leaves behind is gone for the next one.
func TestSuccessorInheritsTheNetwork(t *testing.T) {
	if !netnstest.InNode(t) {
		return
	}
	netnstest.World(t)
	r := newNetworkRuntime(t)
	c := &chain{t: t, build: "a"}
	var first string
	for i := range 4 {
		network, rest := c.outcome(r, c.step(`grep -c . /proc/net/unix; ls /proc | grep -c '^[0-9]'; grep -c . /proc/net/tcp; ls /dev/shm
nc -l -p 7777 & touch /dev/shm/mine; (while :; do sleep 1; done) & true`), 0)
		if i == 0 {
			first = network
		}
		require.Equal(t, first, network, "step %d", i)
		require.Equal(t, "1\n3\n1\n", rest, "its shell, ls and grep, and nothing that listens")
	}
	require.Equal(t, 1, heirs(r))
	require.Eventually(t, func() bool { return heirs(r) == 0 }, 2*patience, 10*time.Millisecond)
}

// TestNetworkOfItsOwn has steps that must not have the network of another one.
func TestNetworkOfItsOwn(t *testing.T) {
	if !netnstest.InNode(t) {
		return
	}
	netnstest.World(t)
	r := newNetworkRuntime(t)
	same := func(*sandbox.Step) {}
	policy := func(s *sandbox.Step) {
		s.Egress = &egress.Policy{Deny: []egress.Range{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}}
	}
	names := func(s *sandbox.Step) { s.Egress = netnstest.Allow(t, "allowed.test") }
	tests := []struct {
		name, script  string
		code          int
		first, second func(*sandbox.Step)
		inherits      bool
	}{
		{"none of these", "true", 0, same, same, true},
		{"the same policy", "true", 0, policy, policy, true},
		{"another policy", "true", 0, same, policy, false},
		{"policy of names", "true", 0, names, names, false},
		{"another build", "true", 0, same, func(s *sandbox.Step) { s.Build = "b" }, false},
		{"no build", "true", 0, func(s *sandbox.Step) { s.Build = "" }, func(s *sandbox.Step) { s.Build = "" }, false},
		{"another root", "true", 0, same, func(s *sandbox.Step) { s.Root.Lower = s.Root.Lower[1:] }, false},
		{"another mode", "true", 0, same, func(s *sandbox.Step) { s.Network = sandbox.NetworkNone }, false},
		{"a failure", "exit 3", 3, same, same, false},
		{"something was sent", "nc -w 1 " + netnstest.Allowed + " 80 </dev/null; true", 0, same, same, false},
		{"something was sent to itself", "nc -w 1 127.0.0.1 80 </dev/null; true", 0, same, same, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := &chain{t: t, build: "a"}
			step := c.step(tt.script)
			tt.first(step)
			first, _ := c.outcome(r, step, tt.code)
			step = c.step("true")
			tt.second(step)
			second, _ := c.outcome(r, step, 0)
			require.Equal(t, tt.inherits, first == second)
		})
	}
}

// TestInheritedNetworkObeys has a policy hold for all who have a network one after the other, and
// what each has reached told of it alone.
func TestInheritedNetworkObeys(t *testing.T) {
	if !netnstest.InNode(t) {
		return
	}
	netnstest.World(t)
	r := newNetworkRuntime(t)
	c := &chain{t: t, build: "a"}
	var networks []string
	for i, script := range []string{"true", fmt.Sprintf("nc -w 2 %s 80 </dev/null; nc -w 2 %s 80 </dev/null; true", netnstest.Allowed, netnstest.Other)} {
		step := c.step(script)
		step.Egress = &egress.Policy{Deny: []egress.Range{{Prefix: netip.MustParsePrefix(netnstest.Other + "/32")}}}
		var out bytes.Buffer
		step.Process.Stdout, step.Process.Stderr = &out, &out
		res, err := r.Run(context.Background(), step, nil)
		require.NoError(t, err)
		network, said, _ := strings.Cut(out.String(), "\n")
		networks = append(networks, network)
		if i == 0 {
			require.Empty(t, res.Network.Reached.List)
			continue
		}
		require.Equal(t, networks[0], network)
		require.Contains(t, said, "hello from "+netnstest.Allowed)
		require.NotContains(t, said, "hello from "+netnstest.Other)
		require.Len(t, res.Network.Reached.List, 1)
		require.Len(t, res.Network.Refused.List, 1)
	}
}

// TestCloseEndsHeirs closes a runtime while sandboxes wait for successors.
func TestCloseEndsHeirs(t *testing.T) {
	if !netnstest.InNode(t) {
		return
	}
	census(t)
	netnstest.World(t)
	cfg := testConfig(filepath.Join(openDir(t), "state"))
	cfg.Networks = netnstest.Networks(t, netnstest.Allow(t))
	r, err := New(context.Background(), cfg)
	require.NoError(t, err)
	var steps []*sandbox.Step
	for i := range maxHeirs + 2 {
		steps = append(steps, (&chain{t: t, build: fmt.Sprint(i)}).step("true"))
	}
	for i, step := range steps {
		_, code := run(t, r, step)
		require.Zero(t, code)
		require.Equal(t, min(i+1, maxHeirs), heirs(r))
	}
	require.NoError(t, r.Close())
	left, err := filepath.Glob("/sys/class/net/kiln*")
	require.NoError(t, err)
	require.Empty(t, left)
	entries, err := os.ReadDir(cfg.StateDir)
	require.NoError(t, err)
	require.NotContains(t, fmt.Sprint(entries), "steps")
}
