package netns

import (
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/stretchr/testify/require"
)

// FuzzContact takes elements as the kernel lists them, whose addresses and ports a step
// has chosen.
func FuzzContact(f *testing.F) {
	f.Add([]byte{10, 0, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0}, uint64(7))
	f.Add([]byte{}, uint64(0))
	f.Fuzz(func(t *testing.T, key []byte, packets uint64) {
		c, ok := contactOf(nftables.SetElement{Key: key, Counter: &expr.Counter{Packets: packets}})
		require.Equal(t, len(key) == 12, ok)
		if ok {
			require.True(t, c.Address.Is4())
			require.NotEmpty(t, c.Protocol)
			require.GreaterOrEqual(t, c.Count, int64(0))
		}
	})
}
