package server

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzLabels wants labels to be what is compiled in, whatever is called.
func FuzzLabels(f *testing.F) {
	f.Add("/kiln.agent.v1.BuildService/GetInfo")
	f.Add("/moby.buildkit.v1.Control/Solve")
	f.Add("//")
	f.Fuzz(func(t *testing.T, fullMethod string) {
		service, method := labels(fullMethod)
		if service == unknown || method == unknown {
			require.Equal(t, [2]string{unknown, unknown}, [2]string{service, method})
			return
		}
		again, _ := labels("/" + service + "/" + method)
		require.Equal(t, service, again)
		require.LessOrEqual(t, len(service)+len(method), 200)
	})
}
