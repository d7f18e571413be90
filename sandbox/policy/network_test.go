package policy

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox/egress"
)

func TestDestinations(t *testing.T) {
	permits := func(to string, all ...Rules) bool {
		rules := Egress(all)
		p := &egress.Policy{Rules: func() []egress.Rules { return rules }, NodeAddresses: func() ([]netip.Addr, error) { return nil, nil }}
		return p.Check("", netip.MustParseAddrPort(to)) == nil
	}
	require.Empty(t, Egress([]Rules{{Name: "says nothing"}}))
	require.True(t, permits("1.2.3.4:443"))
	web := Rules{Name: "a", Destinations: Destinations{Allow: []string{"1.2.3.0/24:443"}}}
	require.True(t, permits("1.2.3.4:443", web))
	require.False(t, permits("1.2.3.4:80", web))
	less := Rules{Name: "b", Destinations: Destinations{Deny: []string{"1.2.3.4"}}}
	require.False(t, permits("1.2.3.4:443", web, less))
	require.True(t, permits("1.2.3.5:443", web, less))

	// What cannot be understood permits nothing, alone and with others.
	for _, d := range []Destinations{
		{Allow: []string{"1.2.3.4/8"}}, {Deny: []string{"host"}}, {Allow: []string{"0.0.0.0/0", ""}}, {Allow: slices.Repeat([]string{"1.2.3.4"}, MaxDestinations+1)},
	} {
		require.NotEmpty(t, d.Problems())
		require.False(t, permits("1.2.3.4:443", Rules{Name: "x", Destinations: d}))
		require.False(t, permits("1.2.3.4:443", Rules{Name: "x", Destinations: d}, web))
	}
	p := Destinations{Allow: []string{"1.2.3.4", "x y"}, Deny: []string{"1.2.3.4", "host"}}.Problems()
	require.Len(t, p, 2)
	require.Equal(t, []any{"allow", 1, "deny", 1}, []any{p[0].List, p[0].Index, p[1].List, p[1].Index})
}
