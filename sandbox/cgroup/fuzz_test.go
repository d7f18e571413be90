package cgroup

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzFiles reads what could be files of the kernel.
func FuzzFiles(f *testing.F) {
	f.Add("4:memory:/a\n0::/b\n", "oom_kill")
	f.Add("8:0 rbytes=1 wbytes=2\n8:16 Read 7\n8:16 Write 9\nTotal 3", "8:0")
	f.Add("usage_usec 12\nmax 3\n", "max")
	f.Add("max", "")
	f.Fuzz(func(t *testing.T, text, key string) {
		for _, h := range parse(text) {
			require.NotNil(t, h)
		}
		_, _ = transfers(text)
		_, _ = number(text, key)
	})
}
