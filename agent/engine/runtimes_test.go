package engine

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// TestWarm has the sandboxes of a node prepared before anybody asks for one.
func TestWarm(t *testing.T) {
	n := openTestNode(t)
	st, err := os.Stat(n.cfg.Root)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), st.Mode().Perm(), "nobody but root gets into the state directory")

	n.Warm(sandbox.Classes...)
	made := func(class sandbox.Class) bool {
		n.runtimes.mu.Lock()
		defer n.runtimes.mu.Unlock()
		return n.runtimes.made[class] != nil
	}
	for _, class := range sandbox.Classes {
		require.Eventually(t, func() bool { return made(class) }, 20*time.Second, 10*time.Millisecond, class)
		rt, err := n.runtimes.get(context.Background(), class)
		require.NoError(t, err)
		require.Equal(t, class, rt.Class())
	}
}

// TestWarmWhileClosing closes a node whose sandboxes are being prepared.
func TestWarmWhileClosing(t *testing.T) {
	openTestNode(t).Warm(sandbox.Classes...)
}

// TestWarmOfWhatIsMissing leaves the error to whom needs the sandbox.
func TestWarmOfWhatIsMissing(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir())
	n, err := OpenNode(context.Background(), NodeConfig{Root: filepath.Join(t.TempDir(), "private"), RunscPath: "/no/such/runsc"})
	require.NoError(t, err)
	defer func() { require.NoError(t, n.Close()) }()
	n.Warm(sandbox.GVisor, sandbox.Userns)
	_, err = n.runtimes.get(context.Background(), sandbox.GVisor)
	var missing *sandbox.UnavailableError
	require.ErrorAs(t, err, &missing)
}
