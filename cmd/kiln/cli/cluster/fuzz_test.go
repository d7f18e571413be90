package cluster

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/patternmatcher"
	"github.com/stretchr/testify/require"
)

// FuzzIgnored wants what a build needs to be sent, whatever is ignored.
func FuzzIgnored(f *testing.F) {
	for _, s := range []string{"**", "*\n!a", "Dockerfile\n.dockerignore", "!", "[", "../x", "\ufeff# x", "a\x00b"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, ".dockerignore"), data, 0o600))
		patterns, err := ignored(dir, "")
		if err != nil {
			return
		}
		m, err := patternmatcher.New(patterns)
		if err != nil {
			return // it is refused where it is used
		}
		out, err := m.MatchesOrParentMatches("Dockerfile")
		if err == nil {
			require.False(t, out, "the Dockerfile is left out by %q", patterns)
		}
	})
}
