package main

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/config"
)

func TestFetchPolicy(t *testing.T) {
	t.Setenv(apiServerEnv, "10.96.0.1")
	t.Setenv(nodeEnv, "172.20.0.3,fd00:20::3")
	p, err := fetchPolicy(t.Context(), config.Fetch{Allow: []string{"127.0.0.1:5000", "10.97.0.5"}, Deny: []string{"10.97.0.0/16"}})
	require.NoError(t, err)
	for to, want := range map[string]string{
		"127.0.0.1:5000": "", "10.96.0.2:443": "", "93.184.216.34:443": "",
		"10.97.0.5:1":      "",
		"172.20.0.3:10250": "the node itself", "[fd00:20::3]:1": "the node itself", "10.97.0.6:1": "in fetch.deny", "127.0.0.1:5001": "loopback", "10.96.0.1:443": "the Kubernetes API server", "169.254.169.254:80": "link-local",
	} {
		err := p.Check("", netip.MustParseAddrPort(to))
		if want == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, want)
	}
	p, err = fetchPolicy(t.Context(), config.Fetch{DenyPrivate: true})
	require.NoError(t, err)
	require.ErrorContains(t, p.Check("", netip.MustParseAddrPort("10.96.0.2:443")), "private network")
	_, err = fetchPolicy(t.Context(), config.Fetch{Allow: []string{"10.0.0.1/8"}})
	require.ErrorContains(t, err, "fetch.allow")
	t.Setenv(apiServerEnv, "localhost")
	p, err = fetchPolicy(t.Context(), config.Fetch{})
	require.NoError(t, err)
	require.NotEmpty(t, p.Deny)
	t.Setenv(nodeEnv, "somewhere")
	_, err = fetchPolicy(t.Context(), config.Fetch{})
	require.ErrorContains(t, err, "NODE_IPS")
}
