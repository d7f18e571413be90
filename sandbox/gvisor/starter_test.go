package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/netns/netnstest"
)

// TestManySandboxes has the same processes start many sandboxes.
func TestManySandboxes(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	const sandboxes, most = 200, 120
	for range sandboxes {
		e.ok(e.step("true"))
	}
	e.settle()
	require.EqualValues(t, sandboxes, e.r.boxes.Load())
	starters, err := os.ReadDir(e.r.startersDir())
	require.NoError(t, err)
	require.NotEmpty(t, starters)
	for _, s := range starters {
		fds, err := os.ReadDir(filepath.Join("/proc", s.Name(), "fd"))
		require.NoError(t, err)
		require.Less(t, len(fds), most, "the process that starts sandboxes keeps descriptors")
		// gVisor wants these for itself in a sandbox.
		for fd := 253; fd <= 255; fd++ {
			info, err := os.ReadFile(fmt.Sprintf("/proc/%s/fdinfo/%d", s.Name(), fd))
			require.NoError(t, err)
			_, flags, _ := strings.Cut(string(info), "flags:")
			n, err := strconv.ParseUint(strings.Fields(flags)[0], 8, 64)
			require.NoError(t, err)
			require.NotZero(t, n&0o2000000, "a sandbox would inherit descriptor %d", fd)
		}
	}
}

// TestSandboxesHaveNoDescriptorsOfOthers has sandboxes with a network, which they reach by
// sockets of their own.
func TestSandboxesHaveNoDescriptorsOfOthers(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	e.r.cfg.Networks = netnstest.Networks(t, netnstest.Allow(t))
	var sockets []int
	for range 8 {
		step := e.step("true")
		step.Network = sandbox.NetworkEgress
		n := 0
		_, err := e.r.Run(t.Context(), step, func() { n = sandboxSockets(t, e.r.cfg.StateDir) })
		require.NoError(t, err)
		e.settle()
		sockets = append(sockets, n)
	}
	require.NotZero(t, sockets[0])
	require.Equal(t, sockets[0], sockets[len(sockets)-1], "of each sandbox: %v", sockets)
}

// sentries returns the directories in /proc of the sandboxes with state in dir.
func sentries(t *testing.T, dir string) (processes []string) {
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err == nil && strings.HasPrefix(string(data), "runsc-sandbox\x00") && strings.Contains(string(data), dir+"/") {
			processes = append(processes, filepath.Dir(name))
		}
	}
	return processes
}

// sandboxSockets counts the sockets of the only sandbox with state in dir.
func sandboxSockets(t *testing.T, dir string) (n int) {
	for _, process := range sentries(t, dir) {
		links, err := filepath.Glob(filepath.Join(process, "fd", "*"))
		require.NoError(t, err)
		for _, link := range links {
			if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, "socket:") {
				n++
			}
		}
	}
	return n
}
