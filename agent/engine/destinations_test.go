package engine

import (
	"context"
	"net/netip"
	"os"
	"testing"

	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/egress/egresstest"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// listedEngine is an engine whose policy lists destinations. Loopback is no denied range
// to it, and every name leads there.
func listedEngine(t *testing.T, d policy.Destinations) *client.Client {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir())
	loopback, err := egress.ParseExceptions([]string{"127.0.0.0/8"})
	require.NoError(t, err)
	resolver := egresstest.Names(t, func(string) netip.Addr { return netip.MustParseAddr("127.0.0.1") })
	e, err := New(context.Background(), Config{
		NodeConfig: NodeConfig{
			Root: t.TempDir(), Fetch: &egress.Policy{Exceptions: loopback, Resolver: resolver},
			Rules: func(Domain) StepRules { return StepRules{Rules: []policy.Rules{{Name: "lists", Destinations: d}}} },
		},
		Sandbox: sandbox.GVisor,
	})
	require.NoError(t, err)
	c, err := e.Client(context.Background())
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, c.Close())
		require.NoError(t, e.Close())
	})
	return c
}

const notListed = `SandboxPolicy "lists" says what may be reached, and does not list it`

// TestFetchesObeyLists fetches by HTTP, git and from registries what a list has, and
// nothing else: by name, by port, by address and after a redirect.
func TestFetchesObeyLists(t *testing.T) {
	o := newOracle(t, secret)
	repo := newRepository(t)
	images, others := newOracle(t, quietRegistry()), newOracle(t, quietRegistry())
	away := newOracle(t, redirect("http://other.example:"+o.port+"/x"))
	c := listedEngine(t, policy.Destinations{Allow: []string{
		"listed.example:" + o.port, "*.sub.example", "front.example:" + away.port, "git.example:" + repo.port, "127.0.0.1:" + images.port,
	}})
	for _, host := range []string{"listed.example", "LISTED.example", "a.sub.example"} {
		got, err := add(t, c, "http://"+host+":"+o.port+"/"+host)
		require.NoError(t, err)
		require.Equal(t, "secret", got)
	}
	require.NoError(t, push(t, c, images.address+"/image"))
	_, _, err := build(t, c, "FROM "+images.address+"/image\nCOPY b /b\n", map[string]string{"b": ""}, nil)
	require.NoError(t, err)
	_, _, err = build(t, c, "FROM scratch\nADD http://git.example:"+repo.port+"/repo.git /src\n", nil, nil)
	require.NoError(t, err)

	before, pulled := o.asked.Load(), repo.asked.Load()
	for _, url := range []string{
		"http://other.example:" + o.port + "/x", "http://sub.example:" + o.port + "/x", "http://" + o.address + "/x",
		"http://listed.example:" + repo.port + "/x", "http://front.example:" + away.port + "/x", "http://other.example:" + repo.port + "/repo.git",
	} {
		_, _, err := build(t, c, "FROM scratch\nADD "+url+" /got\n", nil, nil)
		require.ErrorContains(t, err, notListed, url)
	}
	_, _, err = build(t, c, "FROM "+others.address+"/image\nCOPY b /b\n", map[string]string{"b": ""}, nil)
	require.ErrorContains(t, err, notListed)
	require.ErrorContains(t, push(t, c, others.address+"/image"), notListed)
	require.Zero(t, others.asked.Load())
	require.Equal(t, before, o.asked.Load())
	require.Equal(t, pulled, repo.asked.Load())
	require.Positive(t, away.asked.Load())
}

// TestNoListFetchesFromAnywhere shows that nothing else refused what the list did.
func TestNoListFetchesFromAnywhere(t *testing.T) {
	o := newOracle(t, secret)
	away := newOracle(t, redirect("http://other.example:"+o.port+"/x"))
	got, err := add(t, listedEngine(t, policy.Destinations{}), "http://front.example:"+away.port+"/x")
	require.NoError(t, err)
	require.Equal(t, "secret", got)
	_, err = add(t, listedEngine(t, policy.Destinations{Deny: []string{"127.0.0.1"}}), "http://front.example:"+away.port+"/x")
	require.ErrorContains(t, err, `SandboxPolicy "lists" denies 127.0.0.1/32`)
}

func TestDestinationsOfSteps(t *testing.T) {
	denied := []egress.Range{{Prefix: netip.MustParsePrefix("10.96.0.0/12"), What: "Services"}}
	loopback, err := egress.ParseExceptions([]string{"10.96.0.1"})
	require.NoError(t, err)
	cfg := NodeConfig{Fetch: &egress.Policy{Deny: denied, Exceptions: loopback, NodeAddresses: func() ([]netip.Addr, error) { return nil, nil }}}
	may := func(p *egress.Policy, to string) bool { return p.Check("", netip.MustParseAddrPort(to)) == nil }
	everyone := stepEgress(cfg.Fetch)
	require.False(t, may(everyone, "10.96.0.1:443"), "exceptions are for the agent alone")
	require.False(t, may(everyone, "169.254.169.254:80"))
	require.True(t, may(everyone, "1.2.3.4:80"))

	p := newStepPolicy(cfg)
	got, err := p.egressOf(Domain{Tenant: "a"}, "")
	require.NoError(t, err)
	require.Nil(t, got, "without lists a step has the network as it is prepared")
	cfg.Rules = func(d Domain) StepRules {
		if d.Tenant != "listed" {
			return StepRules{}
		}
		return StepRules{Rules: []policy.Rules{{Name: "lists", Destinations: policy.Destinations{Allow: []string{"1.2.3.0/24", "10.96.0.0/16:443"}}}}}
	}
	p = newStepPolicy(cfg)
	got, err = p.egressOf(Domain{Tenant: "listed"}, "")
	require.NoError(t, err)
	require.True(t, may(got, "1.2.3.4:80") && may(got, "10.96.0.1:443"))
	require.False(t, may(got, "1.2.4.4:80") || may(got, "10.96.0.1:80"))
	// A build narrows and never widens.
	got, err = p.egressOf(Domain{Tenant: "listed"}, "1.2.3.4,1.2.4.4,169.254.169.254")
	require.NoError(t, err)
	require.True(t, may(got, "1.2.3.4:80"))
	require.False(t, may(got, "1.2.3.5:80") || may(got, "1.2.4.4:80") || may(got, "169.254.169.254:80") || may(got, "10.96.0.1:443"))
	got, err = p.egressOf(Domain{Tenant: "a"}, "1.2.3.4")
	require.NoError(t, err)
	require.False(t, may(got, "1.2.3.5:80"))
	_, err = p.egressOf(Domain{Tenant: "a"}, "1.2.3.4,")
	require.Error(t, err)
}
