package userns

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// victimEnv makes the test program run a step until it is killed.
const victimEnv = "KILN_TEST_VICTIM"

// victim runs a step of the layer below dir, and says on its output when it runs.
func victim(dir string) {
	r, err := New(context.Background(), testConfigOf(os.Getppid(), filepath.Join(dir, "state")))
	if err == nil {
		step := &sandbox.Step{
			ID: "victim", Network: sandbox.NetworkNone,
			Root:    sandbox.Tree{Lower: []string{filepath.Join(dir, "root")}, Upper: filepath.Join(dir, "fs"), Work: filepath.Join(dir, "work")},
			Process: sandbox.Process{Args: []string{"/bin/sleep", "1000"}, Cwd: "/"},
		}
		_, err = r.Run(context.Background(), step, func() { fmt.Println("up") })
	}
	fmt.Println(err)
	os.Exit(1)
}

func TestRecoverAfterKill(t *testing.T) {
	census(t)
	dir := openDir(t)
	for _, d := range []string{"fs", "work"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	require.NoError(t, os.Symlink(busybox(t), filepath.Join(dir, "root")))
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "up\n", line)
	time.Sleep(200 * time.Millisecond)

	cfg := testConfig(filepath.Join(dir, "state"))
	_, err = New(context.Background(), cfg)
	require.ErrorContains(t, err, "in use", "its owner lives")
	require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
	require.Error(t, cmd.Wait())

	procs, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/*", cfg.CgroupParent, "*/victim/cgroup.procs"))
	require.NoError(t, err)
	var pids []string
	for _, p := range procs {
		data, err := os.ReadFile(p)
		require.NoError(t, err)
		pids = append(pids, strings.Fields(string(data))...)
	}
	require.NotEmpty(t, pids, "the step outlives its owner, or there is nothing to recover")

	r, err := New(context.Background(), cfg)
	require.NoError(t, err)
	for _, pid := range pids {
		// It may wait for the node's init to take notice of its end.
		stat, _ := os.ReadFile("/proc/" + pid + "/stat")
		require.True(t, len(stat) == 0 || strings.Contains(string(stat), ") Z "), "%s lives: %s", pid, stat)
	}
	require.NoDirExists(t, r.runc.cgroup(filepath.Join(r.cgroupParent(), "victim")))
	for _, d := range []string{"steps", "runc"} {
		left, err := os.ReadDir(filepath.Join(dir, "state/run", d))
		require.NoError(t, err)
		require.Empty(t, left)
	}
	require.NoError(t, r.Close())
	require.NoError(t, unix.Access(filepath.Join(dir, "root/bin/busybox"), unix.R_OK), "layers are never touched")
}
