package integration

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox/netns/netnstest"
)

// TestDestinationsAreAllThatStepsReach has steps try hosts of a world behind the node: all
// without a list, and what the list of the build has with one.
func TestDestinationsAreAllThatStepsReach(t *testing.T) {
	if !netnstest.InNode(t) {
		return
	}
	netnstest.World(t)
	for _, class := range classes {
		t.Run(class, func(t *testing.T) {
			n := newNode(t, class)
			dir := contextDir(t, base+"COPY try /try\nRUN sh /try > /tried\n", map[string]string{"try": netnstest.Try(netnstest.Allowed, netnstest.Other)})
			tried := func(args ...string) string {
				return read(t, n.mustBuildTree(dir, append(append(withTools(t), "--no-cache"), args...)...), "tried")
			}
			out := tried()
			require.Contains(t, out, "yes "+netnstest.Allowed)
			require.Contains(t, out, "yes "+netnstest.Other)
			out = tried("--destination", netnstest.Allowed+":81", "--destination", netnstest.Other+"/32")
			require.Contains(t, out, "no "+netnstest.Allowed)
			require.Contains(t, out, "yes "+netnstest.Other)
			out = tried("--destination", "192.0.2.1")
			require.Contains(t, out, "no "+netnstest.Allowed)
			require.Contains(t, out, "no "+netnstest.Other)

			// It is refused before anything starts: there is no state directory.
			n.root = filepath.Join(t.TempDir(), "none")
			r := n.build(dir, "--destination", "192.0.2.1", "--destination", "192.0.2.1/24")
			require.Equal(t, 2, r.code, r.stderr)
			require.Contains(t, r.stderr, `--destination: "192.0.2.1/24" has bits set`)
			require.NoDirExists(t, n.root)
		})
	}
}
