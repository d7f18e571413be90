package escape

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"
)

// immutableFiles has a step try to make files that cannot be removed. What it has made
// goes when the cache is emptied.
func immutableFiles(t *testing.T, e *env) {
	node, root := e.limitedNode(t)
	r := e.MustBuild(t, build{
		Node: node, NoExport: true, Files: map[string]string{"bomb": bombProgram(t, e.world)},
		Dockerfile: "FROM tools\nCOPY bomb /bin/\nRUN /bin/bomb immutable 2; chmod 0 /fixed\n",
	})
	got, said := gotOf(r.Log)
	t.Logf("it made %d: %s", got, said)
	e.prune(t, node)
	left, err := filepath.Glob(filepath.Join(root, "store/snapshots/snapshots/*/fs/fixed"))
	require.NoError(t, err)
	require.Empty(t, left)
}

// leftDaemons has steps end while processes of theirs go on, in sessions of their own,
// with the step's output and without.
func leftDaemons(t *testing.T, e *env) {
	r := e.MustBuild(t, build{Dockerfile: `FROM tools
RUN sleep 86399 & setsid sleep 86399 >/dev/null 2>&1 </dev/null & setsid setsid sh -c 'trap "" TERM HUP; while :; do sleep 86399; done' & echo first
RUN ps; (setsid nohup sh -c '(sleep 86399 &) ; exec sleep 86399' >/dev/null 2>&1 &) ; echo second > /second
`})
	require.Equal(t, "second\n", r.Read(t, "second"))
	require.Equal(t, 0, strings.Count(r.Log, "sleep 86399\n"), "the second step sees processes of the first: %s", r.Log)
	noProcess(t, "86399")
}

// nestedMounts has a step mount what it can over what it has. What is left of it is seen
// by the census.
func nestedMounts(t *testing.T, e *env) {
	before := mounts(t)
	r := e.MustBuild(t, build{Dockerfile: `FROM tools
RUN --mount=type=tmpfs,target=/a --mount=type=cache,target=/a/b --mount=type=tmpfs,target=/a/b/c mkdir -p /mnt /a/b/c/d && \
  i=0; d=/mnt; while [ $i -lt 100 ]; do mount -t tmpfs none $d && mkdir -p $d/d; mount --bind / $d/d; d=$d/d; i=$((i+1)); done; \
  mount --bind /a/b /a/b/c/d; mount --make-rshared /; unshare -m -r sh -c 'mount -t tmpfs none /mnt; sleep 86399' & sleep 0.2; \
  echo done > /done
`})
	require.Equal(t, "done\n", r.Read(t, "done"))
	noProcess(t, "86399")
	require.Eventually(t, func() bool { return mounts(t) <= before }, 10*time.Second, 20*time.Millisecond, "mounts are left")
	entries, err := os.ReadDir(filepath.Join(r.Dir, "mnt"))
	require.NoError(t, err)
	require.Empty(t, entries, "what was mounted is no part of the layer")
}

// mounts counts the mounts of this process that are about steps.
func mounts(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	return strings.Count(string(data), "\n")
}

// prune empties the attacker's cache.
func (e *env) prune(t *testing.T, node *engine.Node) {
	t.Helper()
	eng, release, err := node.Engine(t.Context(), engine.Domain{Tenant: attacker, Sandbox: e.Class})
	require.NoError(t, err)
	defer release()
	c, err := eng.Client(t.Context())
	require.NoError(t, err)
	defer c.Close()
	for range 2 { // what the first lets go goes the second time
		require.NoError(t, c.Prune(t.Context(), nil, client.PruneAll))
	}
}
