package gvisor

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// TestSocket sends to a socket of the node, as ssh does to its agent. In an
// ordinary mount there is no way to it.
func TestSocket(t *testing.T) {
	e := newEnv(t)
	require.NoError(t, os.Symlink("busybox", e.lower+"/bin/logger"))
	path := t.TempDir() + "/log.sock"
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	require.NoError(t, err)
	defer l.Close()
	for _, socket := range []bool{false, true} {
		step := e.step(fmt.Sprintf("logger socket=%v", socket))
		step.Mounts = []sandbox.Mount{{Destination: "/dev/log", Tree: sandbox.Tree{Dir: path}, Socket: socket}}
		e.ok(step)
	}
	require.NoError(t, l.SetReadDeadline(time.Now().Add(2*time.Second)))
	buf := make([]byte, 512)
	n, err := l.Read(buf)
	require.NoError(t, err)
	require.Contains(t, string(buf[:n]), "socket=true", "the first message is that of the step that may")
}

func TestParallelSteps(t *testing.T) {
	e := newEnv(t)
	var wg sync.WaitGroup
	for i := range 4 {
		step := e.step(fmt.Sprintf("echo %d >/own", i))
		dir := t.TempDir()
		for _, d := range []string{"u", "w"} {
			require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
		}
		step.Root.Upper, step.Root.Work = dir+"/u", dir+"/w"
		wg.Go(func() {
			res, err := e.r.Run(context.Background(), step, nil)
			if err != nil || res.ExitCode != 0 {
				t.Errorf("step %d: %v %v", i, res, err)
				return
			}
			data, err := os.ReadFile(dir + "/u/own")
			if err != nil || string(data) != fmt.Sprintf("%d\n", i) {
				t.Errorf("step %d: wrote %q, %v", i, data, err)
			}
		})
	}
	wg.Wait()
}

// TestCgroup gives every sandbox a cgroup below a parent.
func TestCgroup(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	step := e.step("echo ready; sleep 0.3")
	var found []string
	in := 0
	step.Process.Stdout = nil
	res, err := e.r.Run(context.Background(), step, func() {
		boxes, _ := filepath.Glob(e.r.stepsDir() + "/*/runsc")
		require.Len(t, boxes, 1)
		st, err := readState(boxes[0])
		require.NoError(t, err)
		for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
			dirs, _ := filepath.Glob(pattern + e.r.cfg.CgroupParent + "/" + e.r.id + "-*")
			found = append(found, dirs...)
		}
		for _, d := range found {
			procs, err := os.ReadFile(d + "/cgroup.procs")
			require.NoError(t, err)
			if slices.Contains(strings.Fields(string(procs)), fmt.Sprint(st.Sandbox.PID)) {
				in++
			}
		}
	})
	require.NoError(t, err)
	require.Zero(t, res.ExitCode)
	require.GreaterOrEqual(t, in, 1, "%v", found)
	// The unified hierarchy may have no limits.
	require.GreaterOrEqual(t, in, len(found)-1, "the sandbox is in its cgroups: %v", found)
	e.settle()
	for _, d := range found {
		require.NoDirExists(t, d)
	}
}
