package userns

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/mountns"
)

func TestMain(m *testing.M) {
	if err := mountns.Enter(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if dir := os.Getenv(victimEnv); dir != "" {
		victim(dir)
	}
	// The first child, socket and path resolution make descriptors that are kept.
	_, _ = sandbox.ResolveUser("/", "root")
	_ = exec.Command("/bin/true").Run()
	if l, err := net.Listen("unix", ""); err == nil {
		l.Close()
	}
	goleak.VerifyTestMain(m)
}

// runcPath is the runc that the project is built with, or the one on the PATH.
func runcPath() string {
	if p, err := filepath.Abs("../../bin/runc"); err == nil {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return "runc"
}

var unique atomic.Int64

func testConfig(stateDir string) Config { return testConfigOf(os.Getpid(), stateDir) }

func testConfigOf(pid int, stateDir string) Config {
	return Config{StateDir: stateDir, CgroupParent: fmt.Sprintf("/kiln-test-%d", pid)}
}

// openDir returns a directory that everyone can search, in one that only root can:
// a step gets to its trees by descriptors, and needs no way to them.
func openDir(t testing.TB) string {
	t.Helper()
	private, err := os.MkdirTemp("", "kiln-userns-") // mode 0700
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(private)) })
	dir := filepath.Join(private, "dir")
	require.NoError(t, os.Mkdir(dir, 0o755))
	return dir
}

func newRuntime(t testing.TB) *Runtime {
	t.Helper()
	census(t)
	r, err := New(context.Background(), testConfig(filepath.Join(openDir(t), "state")))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

// census fails the test when it leaves something on the node.
func census(t testing.TB) {
	t.Helper()
	before := node(t)
	t.Cleanup(func() {
		// The kernel takes a moment to let go of killed processes.
		for range 50 {
			if node(t) == before {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		require.Equal(t, before, node(t), "left behind on the node")
	})
}

func node(t testing.TB) string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	var mounts []string
	for line := range strings.Lines(string(info)) {
		if strings.Contains(line, "kiln-userns-") { // not those of others
			mounts = append(mounts, line)
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	cgroups, err := filepath.Glob(fmt.Sprintf("/sys/fs/cgroup/*/kiln-test-%d", os.Getpid()))
	require.NoError(t, err)
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	require.NoError(t, err)
	var children []string
	for _, task := range tasks {
		data, _ := os.ReadFile(task) // threads come and go
		children = append(children, strings.Fields(string(data))...)
	}
	var open []string
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			open = append(open, target)
		}
	}
	return fmt.Sprintf("mounts %q\nfds %q\ncgroups %v\nchildren %s", mounts, open, cgroups, children)
}

// busybox makes a root file system and returns its directory.
func busybox(t testing.TB) string {
	t.Helper()
	root := openDir(t)
	for _, d := range []string{"bin", "etc", "tmp", "proc", "sys", "dev"} {
		require.NoError(t, os.Mkdir(filepath.Join(root, d), 0o755))
	}
	require.NoError(t, os.Chmod(filepath.Join(root, "tmp"), 0o777|fs.ModeSticky))
	program, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(root, "bin/busybox"), program, 0o755))
	list, err := exec.Command("/bin/busybox", "--list").Output()
	require.NoError(t, err)
	for _, name := range strings.Fields(string(list)) {
		if name != "busybox" {
			require.NoError(t, os.Symlink("busybox", filepath.Join(root, "bin", name)))
		}
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/:/bin/sh\nwww:x:33:34::/:/bin/sh\n"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/group"), []byte("root:x:0:\nwww:x:34:\nextra:x:55:www\n"), 0o644))
	return root
}

// newStep returns a step that runs script on a new layer over a busybox.
func newStep(t testing.TB, script string) *sandbox.Step {
	t.Helper()
	snapshot := openDir(t)
	tree := sandbox.Tree{Lower: []string{busybox(t)}, Upper: filepath.Join(snapshot, "fs"), Work: filepath.Join(snapshot, "work")}
	require.NoError(t, os.Mkdir(tree.Upper, 0o755))
	require.NoError(t, os.Mkdir(tree.Work, 0o700))
	return &sandbox.Step{
		ID: fmt.Sprintf("t%d-%d", os.Getpid(), unique.Add(1)), Root: tree, Network: sandbox.NetworkNone,
		Process: sandbox.Process{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}},
	}
}

// run runs step and returns its output.
func run(t testing.TB, r *Runtime, step *sandbox.Step) (string, int) {
	t.Helper()
	var out bytes.Buffer
	step.Process.Stdout, step.Process.Stderr = &out, &out
	res, err := r.Run(context.Background(), step, nil)
	require.NoError(t, err, out.String())
	return out.String(), res.ExitCode
}

// sh runs script on a new step and wants it to succeed.
func sh(t testing.TB, r *Runtime, script string) string {
	t.Helper()
	out, code := run(t, r, newStep(t, script))
	require.Zero(t, code, out)
	return out
}
