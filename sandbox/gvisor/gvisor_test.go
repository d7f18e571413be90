package gvisor

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kiln-build/kiln/sandbox"
)

func TestMain(m *testing.M) {
	spawner() // lives as long as the program
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent())
}

// runscPath is the runsc that `make build` makes.
func runscPath(t testing.TB) string {
	p, err := filepath.Abs(cmp.Or(os.Getenv("KILN_TEST_RUNSC"), "../../bin/runsc"))
	require.NoError(t, err)
	_, err = os.Stat(p)
	require.NoError(t, err, "build runsc first: make build")
	return p
}

// env is a runtime and the directories of one step's root.
type env struct {
	t            testing.TB
	r            *Runtime
	lower, upper string
	work         string
	n            int
}

func newEnv(t testing.TB) *env { return newEnvWith(t, Config{}) }

// newEnvWith is newEnv with a configuration of which the paths are filled in.
func newEnvWith(t testing.TB, cfg Config) *env {
	dir := t.TempDir()
	e := &env{t: t, lower: filepath.Join(dir, "lower"), upper: filepath.Join(dir, "upper"), work: filepath.Join(dir, "work")}
	for _, d := range []string{e.lower, e.upper, e.work, e.lower + "/bin", e.lower + "/etc", e.lower + "/root"} {
		require.NoError(t, os.MkdirAll(d, 0o755))
	}
	busybox, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "install busybox-static")
	require.NoError(t, os.WriteFile(e.lower+"/bin/busybox", busybox, 0o755))
	for _, a := range strings.Fields("sh true cat ls id dmesg uname sleep rm mkdir mv ln chmod chown touch kill stat mkfifo mknod readlink ps pwd seq df grep wc find env") {
		require.NoError(t, os.Symlink("busybox", e.lower+"/bin/"+a))
	}
	require.NoError(t, os.WriteFile(e.lower+"/etc/passwd", []byte("root:x:0:0::/root:/bin/sh\napp:x:33:44::/app:/bin/sh\n"), 0o644))
	require.NoError(t, os.WriteFile(e.lower+"/etc/group", []byte("root:x:0:\napp:x:44:\nextra:x:55:app\n"), 0o644))
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = fmt.Sprintf("/kiln-gvisor-test-%d", os.Getpid())
	}
	cfg.RunscPath, cfg.StateDir = runscPath(t), filepath.Join(dir, "state")
	e.r, err = New(context.Background(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, e.r.Close()) })
	return e
}

func (e *env) step(script string) *sandbox.Step {
	e.n++
	return &sandbox.Step{
		ID:      fmt.Sprintf("step%d", e.n),
		Root:    sandbox.Tree{Lower: []string{e.lower}, Upper: e.upper, Work: e.work},
		Network: sandbox.NetworkNone,
		Process: sandbox.Process{Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/"},
	}
}

// run runs a step and returns its output.
func (e *env) run(step *sandbox.Step) (string, *sandbox.Result) {
	var out bytes.Buffer
	step.Process.Stdout, step.Process.Stderr = &out, &out
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	res, err := e.r.Run(ctx, step, nil)
	require.NoError(e.t, err, out.String())
	return out.String(), res
}

func (e *env) ok(step *sandbox.Step) string {
	out, res := e.run(step)
	require.Zero(e.t, res.ExitCode, out)
	return out
}

// settle waits until what steps have left to the background is done.
func (e *env) settle() {
	e.r.pool.making.Wait()
	e.r.pool.releasing.Wait()
}

func TestRunsOnGVisor(t *testing.T) {
	e := newEnv(t)
	out := e.ok(e.step("echo hello; dmesg; cat /proc/version; uname -a; cat /etc/hosts"))
	require.Contains(t, out, "hello\n")
	require.Contains(t, out, "gVisor")
	require.Contains(t, out, "buildkitsandbox")
}

func BenchmarkRunTrue(b *testing.B) {
	e := newEnv(b)
	for b.Loop() {
		e.ok(e.step("true"))
	}
}
