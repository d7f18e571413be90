package escape

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
)

var _ = register(entry{
	ID: "fault/read-only", Severity: takesNodeDown,
	Threat: "The kernel makes the file system of the node's state read-only in the middle of a build, as it does when a disk fails.",
	Test:   readOnly,
})

// failingDisk is a file system that can be made to fail.
type failingDisk struct{ image, dir string }

func newFailingDisk(t *testing.T) failingDisk {
	t.Helper()
	d := failingDisk{filepath.Join(t.TempDir(), "disk"), filepath.Join(t.TempDir(), "disk")}
	require.NoError(t, os.Mkdir(d.dir, 0o755))
	require.NoError(t, os.WriteFile(d.image, nil, 0o600))
	require.NoError(t, os.Truncate(d.image, 96<<20))
	command(t, "mkfs.ext4", "-q", "-N", "8192", d.image)
	d.mount(t)
	t.Cleanup(func() { _ = exec.Command("umount", d.dir).Run() }) // it may be unmounted already
	return d
}

func (d failingDisk) mount(t *testing.T) {
	t.Helper()
	command(t, "mount", "-o", "loop,errors=remount-ro", d.image, d.dir)
}

func (d failingDisk) unmount(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool { return exec.Command("umount", d.dir).Run() == nil }, 10*time.Second, 50*time.Millisecond, "the disk stays in use")
}

func command(t *testing.T, program string, args ...string) {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", program, args, out)
}

// node opens a node whose state is on the disk. closeNode may be called again.
func (d failingDisk) node(t *testing.T) (n *engine.Node, closeNode func() error) {
	t.Helper()
	n, err := engine.OpenNode(context.Background(), engine.NodeConfig{Root: filepath.Join(d.dir, "root"), RunscPath: agenttest.RepoBin(t, "runsc")})
	require.NoError(t, err)
	closeNode = sync.OnceValue(n.Close)
	t.Cleanup(func() { _ = closeNode() })
	return n, closeNode
}

// readOnly has the disk of a node fail. The kernel refuses to remount it read-only on
// demand as long as the node has files open to be written to; when it does so itself, it
// takes no writes any more until the disk has been unmounted.
func readOnly(t *testing.T, e *env) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp) // nodes change it
	disk := newFailingDisk(t)
	node, closeNode := disk.node(t)
	first := "FROM tools\nRUN echo first > /first\n"
	r := e.Build(t, build{Node: node, Dockerfile: first})
	require.NoError(t, r.Err, r.Log)
	require.Error(t, exec.Command("mount", "-o", "remount,ro", disk.dir).Run(), "files are open")

	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	running, done := make(chan struct{}), make(chan result, 1)
	once := sync.OnceFunc(func() { close(running) })
	go func() {
		done <- e.BuildContext(t, ctx, build{
			Node:       node,
			Dockerfile: "FROM tools\nRUN echo running; for i in $(seq 30); do echo more >> /file || exit 7; sleep 0.1; done\nRUN echo then\n",
			Log: func(text string) {
				if strings.Contains(text, "running") {
					once()
				}
			},
		})
	}()
	select {
	case <-running:
	case r := <-done:
		require.NoError(t, r.Err, "before the disk fails")
	}
	command(t, "mount", "-o", "remount,abort", disk.dir)
	r = <-done
	t.Logf("the disk fails: %.300v", r.Err)
	require.Error(t, r.Err)
	require.Regexp(t, "[Rr]ead-only file system", r.Log+r.Err.Error())
	for _, dockerfile := range []string{first, "FROM tools\nRUN echo second > /second\n", "FROM scratch\nCOPY f /\n"} {
		start := time.Now()
		r := e.Build(t, build{Node: node, Dockerfile: dockerfile, Files: map[string]string{"f": "x"}})
		require.ErrorContains(t, r.Err, "read-only file system")
		require.Less(t, time.Since(start), 10*time.Second)
	}
	require.NoError(t, os.Setenv("TMPDIR", temp))
	e.healthy(t) // another node of the same process
	start := time.Now()
	t.Logf("the node is closed: %.300v", closeNode())
	require.Less(t, time.Since(start), 10*time.Second)
	disk.unmount(t)

	disk.mount(t)
	node, closeNode = disk.node(t)
	// BuildKit keeps by reference what it has read of sources, for all engines of a
	// process, also those that were closed; so these are others.
	r = e.Build(t, build{Node: node, Meets: "after", Dockerfile: first + "RUN cat /first > /after\n"})
	require.NoError(t, r.Err, r.Log)
	require.Equal(t, "first\n", r.Read(t, "after"))
	require.NoError(t, closeNode())
	require.NoError(t, os.Setenv("TMPDIR", temp))
	disk.unmount(t)
}
