package userns

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
			Process: sandbox.Process{Args: []string{"/bin/sleep", "1000"}, Cwd: "/", User: "www"},
		}
		_, err = r.Run(context.Background(), step, func() { fmt.Println("up") })
	}
	fmt.Println(err)
	os.Exit(1)
}

// kill runs a step below dir in a process of its own, kills that process, and returns
// the IDs that the sandboxes' processes had.
func kill(t *testing.T, dir string, cfg Config) (pids []string) {
	t.Helper()
	for _, d := range []string{"fs", "work"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "up\n", line)
	time.Sleep(200 * time.Millisecond) // sandboxes are made ahead meanwhile

	_, err = New(context.Background(), cfg)
	require.ErrorContains(t, err, "in use", "its owner lives")
	procs, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/unified", cfg.CgroupParent, "*/*/cgroup.procs"))
	require.NoError(t, err)
	for _, p := range procs {
		data, err := os.ReadFile(p)
		require.NoError(t, err)
		pids = append(pids, strings.Fields(string(data))...)
	}
	require.Greater(t, len(pids), 1, "the step, and at least one sandbox made ahead")
	require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
	require.Error(t, cmd.Wait())
	return pids
}

// alive returns which processes there are. A dead one may wait for the node's init to
// take notice of its end.
func alive(pids []string) (living []string) {
	for _, pid := range pids {
		stat, _ := os.ReadFile("/proc/" + pid + "/stat")
		if len(stat) > 0 && !strings.Contains(string(stat), ") Z ") {
			living = append(living, string(stat))
		}
	}
	return living
}

// recovered makes a runtime after a kill, and wants nothing left.
func recovered(t *testing.T, cfg Config) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/*", cfg.CgroupParent, "*/*/cgroup.procs"))
	require.NoError(t, err)
	require.NotEmpty(t, left, "there is nothing to recover")
	hierarchies := map[string]bool{}
	for _, l := range left {
		hierarchies[strings.Split(l, "/")[4]] = true
	}
	require.True(t, hierarchies["unified"] && hierarchies["memory"], "%v", hierarchies)
	r, err := New(context.Background(), cfg)
	require.NoError(t, err)
	steps, err := os.ReadDir(filepath.Join(cfg.StateDir, "run/steps"))
	require.NoError(t, err)
	require.Empty(t, steps)
	require.NoError(t, r.Close())
	for _, cgroup := range left {
		require.NoFileExists(t, cgroup)
	}
}

func TestStepsEndWithTheirOwner(t *testing.T) {
	census(t)
	dir := openDir(t)
	cfg := testConfig(filepath.Join(dir, "state"))
	root := busybox(t)
	require.NoError(t, os.Symlink(root, filepath.Join(dir, "root")))
	pids := kill(t, dir, cfg)
	require.Eventually(t, func() bool { return len(alive(pids)) == 0 }, 5*time.Second, 10*time.Millisecond, "a step, or a sandbox made ahead, outlives its owner")
	recovered(t, cfg)
	require.NoError(t, unix.Access(filepath.Join(dir, "root/bin/busybox"), unix.R_OK), "layers are never touched")
}

// TestRecoverAfterKill has a step that the kernel does not kill with its owner, as it
// has executed a setuid program.
func TestRecoverAfterKill(t *testing.T) {
	census(t)
	dir := openDir(t)
	cfg := testConfig(filepath.Join(dir, "state"))
	root := busybox(t)
	require.NoError(t, os.Symlink(root, filepath.Join(dir, "root")))
	sleep := filepath.Join(root, "bin/sleep")
	require.NoError(t, os.Remove(sleep))
	program, err := os.ReadFile(filepath.Join(root, "bin/busybox"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(sleep, program, 0o755))
	require.NoError(t, os.Chmod(sleep, 0o755|os.ModeSetuid))
	pids := kill(t, dir, cfg)
	time.Sleep(200 * time.Millisecond)
	require.Len(t, alive(pids), 1, "the step")
	recovered(t, cfg)
	require.Empty(t, alive(pids))
}

func TestOtherStateDirectories(t *testing.T) {
	census(t)
	dir := openDir(t)
	require.NoError(t, os.Symlink(busybox(t), filepath.Join(dir, "root")))
	living, err := New(context.Background(), testConfig(filepath.Join(dir, "living")))
	require.NoError(t, err)
	cells := waiting(t, living)
	cfg := testConfig(filepath.Join(dir, "state"))
	pids := kill(t, dir, cfg)
	require.Eventually(t, func() bool { return len(alive(pids)) == len(cells) }, 5*time.Second, 10*time.Millisecond)

	other, err := New(context.Background(), testConfig(filepath.Join(dir, "other")))
	require.NoError(t, err)
	left, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/unified", cfg.CgroupParent, "*"))
	require.NoError(t, err)
	left = slices.DeleteFunc(left, func(p string) bool { st, err := os.Stat(p); return err != nil || !st.IsDir() })
	require.Len(t, left, 2, "those of the runtimes that live")
	for _, c := range cells {
		require.True(t, c.alive())
	}
	require.NoError(t, other.Close())
	require.Equal(t, "ok\n", sh(t, living, "echo ok"))
	require.NoError(t, living.Close())
}
