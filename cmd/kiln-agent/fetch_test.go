package main

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/config"
)

func TestFetchPolicy(t *testing.T) {
	t.Setenv(apiServerEnv, "10.96.0.1")
	p, err := fetchPolicy(config.Fetch{Allow: []string{"127.0.0.1:5000"}})
	require.NoError(t, err)
	for to, want := range map[string]string{
		"127.0.0.1:5000": "", "10.96.0.2:443": "", "93.184.216.34:443": "",
		"127.0.0.1:5001": "loopback", "10.96.0.1:443": "the Kubernetes API server", "169.254.169.254:80": "link-local",
	} {
		err := p.Check("", netip.MustParseAddrPort(to))
		if want == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, want)
	}
	p, err = fetchPolicy(config.Fetch{DenyPrivate: true})
	require.NoError(t, err)
	require.ErrorContains(t, p.Check("", netip.MustParseAddrPort("10.96.0.2:443")), "private network")
	_, err = fetchPolicy(config.Fetch{Allow: []string{"10.0.0.1/8"}})
	require.ErrorContains(t, err, "fetch.allow")
}
