package engine

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// TestANodeThatWentDownBeginsAnew has a mark of another boot beside a cache.
func TestANodeThatWentDownBeginsAnew(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir())
	root := filepath.Join(t.TempDir(), "private")
	mark := filepath.Join(root, "unsynced")
	losses := 0
	with := func(fn func(*client.Client)) {
		e, err := New(context.Background(), Config{NodeConfig: NodeConfig{Root: root, OnLoss: func() { losses++ }}, Sandbox: sandbox.Userns})
		require.NoError(t, err)
		c, err := e.Client(context.Background())
		require.NoError(t, err)
		fn(c)
		require.NoError(t, c.Close())
		require.NoError(t, e.Close())
		require.NoFileExists(t, mark, "all is synced")
	}
	with(func(c *client.Client) {
		require.NoFileExists(t, mark)
		fill(t, c, 1<<20, 'a')
		require.FileExists(t, mark, "a build's commits are not synced")
	})
	with(func(c *client.Client) { require.Greater(t, usedSpace(t, c), int64(1<<20)) })
	require.Zero(t, losses)

	require.NoError(t, os.WriteFile(mark, []byte("another boot\n"), 0o600))
	for _, name := range []string{refsFile, keysFile, historyFile, filepath.Join("store", "metadata.db"), filepath.Join("store", "snapshots", "metadata.db")} {
		// Nobody may open what was not synced: it cannot be told from what was.
		require.NoError(t, os.WriteFile(filepath.Join(root, name), []byte("half-written"), 0o600))
	}
	with(func(c *client.Client) {
		require.Equal(t, 1, losses)
		require.Zero(t, usedSpace(t, c))
		fill(t, c, 1<<20, 'a')
		require.Greater(t, usedSpace(t, c), int64(1<<20))
	})
	require.Equal(t, 1, losses)
}

// TestEngineThatDoesNotOpenHoldsNothing opens it again when what was wrong is mended: its
// databases are locked while they are open.
func TestEngineThatDoesNotOpenHoldsNothing(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir())
	n, err := OpenNode(context.Background(), NodeConfig{Root: t.TempDir()})
	require.NoError(t, err)
	defer func() { require.NoError(t, n.Close()) }()
	d := Domain{Tenant: "a", Sandbox: sandbox.Userns}
	id := filepath.Join(n.domainDir(d), "workerid")
	require.NoError(t, os.MkdirAll(id, 0o700))
	_, _, err = n.Engine(context.Background(), d)
	require.ErrorContains(t, err, "workerid")

	require.NoError(t, os.Remove(id))
	opened := make(chan error, 1)
	go func() {
		_, release, err := n.Engine(context.Background(), d)
		if err == nil {
			release()
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		require.NoError(t, err)
	case <-time.After(time.Minute):
		t.Fatal("it does not open")
	}
}
