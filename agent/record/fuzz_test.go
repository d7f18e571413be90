package record

import (
	"encoding/base64"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzPageToken lists with tokens of callers, who may make them up. A token shows no
// build of another tenant, and none that is refused as anything but a token.
func FuzzPageToken(f *testing.F) {
	clk := newClock()
	s, err := Open(f.TempDir(), Options{Now: clk.now})
	require.NoError(f, err)
	f.Cleanup(func() { _ = s.Close() })
	for i, tenant := range []string{"a", "b", "a", "b", "a"} {
		_, err := s.Create(build(tenant, id(i)))
		require.NoError(f, err)
	}
	_, next, err := s.List(Query{Tenant: "a", PageSize: 1, PageBytes: 1 << 20})
	require.NoError(f, err)
	f.Add(next)
	f.Add("")
	f.Add("AAAA")
	f.Add(base64.RawURLEncoding.EncodeToString([]byte("\xff\xff\xff\xff\xff\xff\xff\xffb/b1")))
	f.Fuzz(func(t *testing.T, token string) {
		seen := map[string]bool{}
		for {
			page, next, err := s.List(Query{Tenant: "a", PageSize: 1, PageBytes: 1 << 20, PageToken: token})
			if err != nil {
				require.ErrorIs(t, err, ErrPageToken)
				return
			}
			for _, b := range page {
				require.Equal(t, "a", b.GetTenant())
				require.False(t, seen[b.GetBuildId()], "a page twice")
				seen[b.GetBuildId()] = true
			}
			if token = next; token == "" {
				return
			}
		}
	})
}
