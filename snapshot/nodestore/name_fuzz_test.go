package nodestore

import (
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/stretchr/testify/require"
)

// FuzzNames wants names and repositories to be exactly what was asked for.
func FuzzNames(f *testing.F) {
	for _, s := range [][2]string{{"docker.io", "library/busybox"}, {"a.example:5000", "b"}, {"a.example", "../b"}, {"-", "x"}, {"a/b", "c"}, {"localhost", "x:y"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, host, path string) {
		if named, ok := repository(host, path); ok {
			require.Equal(t, host, reference.Domain(named))
			require.Equal(t, path, reference.Path(named))
			require.False(t, strings.Contains(path, ".."+"/") || strings.ContainsAny(path, "@: \x00"), "%q", path)
		}
		if named, err := ParseName(host + "/" + path); err == nil {
			again, err := ParseName(named.String())
			require.NoError(t, err)
			require.Equal(t, named.String(), again.String())
		}
	})
}
