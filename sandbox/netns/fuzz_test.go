package netns

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func FuzzNameservers(f *testing.F) {
	for _, s := range []string{"nameserver 10.0.0.1\n", "nameserver ::1%eth0\nnameserver x", "search a\nnameserver\t1.1.1.1 # x", "", "\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		require.NoError(t, os.WriteFile(path, data, 0o600))
		found, err := readResolvConf(path)
		if err != nil {
			return
		}
		for _, a := range found {
			require.True(t, a.IsValid())
		}
	})
}
