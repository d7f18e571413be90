package gvisor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

func TestHowAProcessEnds(t *testing.T) {
	e := newEnv(t)
	for script, want := range map[string]int{"exit 7": 7, "kill -9 $$": 137, "kill -TERM $$": 143, "sleep 100 & exit 3": 3, "(kill -9 1); sleep 1": 137} {
		_, res := e.run(e.step(script))
		require.Equal(t, want, res.ExitCode, script)
	}
	step := e.step("")
	step.Process.Args = []string{"/no/such/program"}
	_, err := e.r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "/no/such/program")

	require.Equal(t, "1\n", e.ok(e.step("echo $$")), "the step's process is the first of its namespace")
}

func TestStreamsAndSignals(t *testing.T) {
	e := newEnv(t)
	step := e.step("cat; echo err >&2; trap 'echo got; exit 4' USR1; echo ready; while :; do sleep 0.05; done")
	step.Process.Stdin = io.NopCloser(strings.NewReader("input\n"))
	signals := make(chan syscall.Signal)
	step.Process.Signal = signals
	var out, errs bytes.Buffer
	pr, pw := io.Pipe()
	step.Process.Stdout, step.Process.Stderr = io.MultiWriter(&out, pw), &errs
	go func() {
		buf := make([]byte, 4096)
		seen := ""
		for !strings.Contains(seen, "ready") {
			n, err := pr.Read(buf)
			if err != nil {
				return
			}
			seen += string(buf[:n])
		}
		go func() { _, _ = io.Copy(io.Discard, pr) }()
		signals <- syscall.SIGUSR1
	}()
	res, err := e.r.Run(context.Background(), step, nil)
	pw.Close()
	require.NoError(t, err)
	require.Equal(t, 4, res.ExitCode)
	require.Equal(t, "input\nready\ngot\n", out.String())
	require.Equal(t, "err\n", errs.String())
}

func TestUserCwdAndEnvironment(t *testing.T) {
	e := newEnv(t)
	step := e.step("id; pwd; echo $FOO; ls -ld /made/here")
	step.Process.User = "app"
	step.Process.Cwd = "/made/here"
	step.Process.Env = append(step.Process.Env, "FOO=bar")
	step.Hostname = "named"
	out := e.ok(step)
	require.Contains(t, out, "uid=33(app) gid=44(app) groups=55(extra)")
	require.Contains(t, out, "/made/here\nbar\n")
	require.DirExists(t, e.upper+"/made/here")
	require.NoDirExists(t, e.upper+"/etc", "mount points are no part of the layer")
	require.NoDirExists(t, e.upper+"/proc")

	step = e.step("true")
	step.Process.User = "nobody-knows"
	_, err := e.r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "nobody-knows")
}

func TestMounts(t *testing.T) {
	e := newEnv(t)
	dir := t.TempDir()
	for _, d := range []string{"cache", "ro", "sub/inner"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	require.NoError(t, os.WriteFile(dir+"/ro/file", []byte("read me"), 0o644))
	require.NoError(t, os.WriteFile(dir+"/secret", []byte("secret"), 0o400))
	step := e.step(`set -e
echo kept >/cache/kept; mkdir /cache/d; chown 33 /cache/d; cat /ro/file /run/secrets/s
{ ! echo x >/ro/new; ! echo x >/run/secrets/s; } 2>/dev/null; echo x >/scratch/x; test ! -e /dev/kvm; ls /sub
touch /scratch2/x; echo hidden >/tmp/hidden`)
	step.Mounts = []sandbox.Mount{
		{Destination: "/cache", Tree: sandbox.Tree{Dir: dir + "/cache"}},
		{Destination: "/ro", Tree: sandbox.Tree{Dir: dir + "/ro"}, Readonly: true},
		{Destination: "/run/secrets/s", Tree: sandbox.Tree{Dir: dir + "/secret"}, Readonly: true},
		{Destination: "/scratch", Tree: sandbox.Tree{Tmpfs: &sandbox.Tmpfs{Size: 1 << 20}}},
		{Destination: "/scratch2", Tree: sandbox.Tree{Tmpfs: &sandbox.Tmpfs{}}},
		{Destination: "/sub", Tree: sandbox.Tree{Dir: dir}, Subpath: "sub"},
		{Destination: "/tmp", Tree: sandbox.Tree{Tmpfs: &sandbox.Tmpfs{}}},
	}
	require.Equal(t, "read mesecretinner\n", e.ok(step))
	data, err := os.ReadFile(dir + "/cache/kept")
	require.NoError(t, err)
	require.Equal(t, "kept\n", string(data))
	st, err := os.Stat(dir + "/cache/d")
	require.NoError(t, err)
	require.EqualValues(t, 33, st.Sys().(*syscall.Stat_t).Uid)
	entries, err := os.ReadDir(e.upper)
	require.NoError(t, err)
	require.Empty(t, entries)
}

// TestDanglingMountPoint has the links that distributions have.
func TestDanglingMountPoint(t *testing.T) {
	e := newEnv(t)
	require.NoError(t, os.Symlink("../run/resolve/stub.conf", e.lower+"/etc/resolv.conf"))
	require.NoError(t, os.Symlink("/loop", e.lower+"/loop"))
	require.NoError(t, os.Symlink("/../../../../../opt", e.lower+"/up"))
	step := e.step("cat /etc/resolv.conf; readlink /etc/resolv.conf; echo x >/up/cache/x")
	dir := t.TempDir()
	step.Mounts = []sandbox.Mount{{Destination: "/up/cache", Tree: sandbox.Tree{Dir: dir}}}
	require.Equal(t, "../run/resolve/stub.conf\n", e.ok(step))
	require.FileExists(t, dir+"/x")
	entries, err := os.ReadDir(e.upper)
	require.NoError(t, err)
	require.Empty(t, entries)
	step.Mounts[0].Destination = "/loop/x"
	_, err = e.r.Run(context.Background(), step, nil)
	require.Error(t, err)
}

func TestReadonlyAndPlainRoots(t *testing.T) {
	e := newEnv(t)
	step := e.step("{ ! echo x >/x && ! mkdir /y; } 2>/dev/null")
	step.ReadonlyRoot = true
	e.ok(step)
	step = e.step("! echo x >/x 2>/dev/null")
	step.Root = sandbox.Tree{Lower: []string{e.lower}}
	e.ok(step)

	step = e.step("echo through >/x; rm /bin/find")
	step.Root = sandbox.Tree{Dir: e.lower}
	e.ok(step)
	require.FileExists(t, e.lower+"/x")
	require.NoFileExists(t, e.lower+"/bin/find")
	require.NoDirExists(t, e.lower+"/proc")
	require.NoFileExists(t, e.lower+"/etc/hosts")
}

func TestNetworkNone(t *testing.T) {
	e := newEnv(t)
	out := e.ok(e.step("cat /proc/net/dev | grep : ; true"))
	require.NotContains(t, out, "eth")
	step := e.step("true")
	step.Network = sandbox.NetworkEgress
	_, err := e.r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "network")
}

func TestExec(t *testing.T) {
	e := newEnv(t)
	_, err := e.r.Exec(context.Background(), "nothing", sandbox.Process{Args: []string{"/bin/true"}, Cwd: "/"})
	require.ErrorIs(t, err, sandbox.ErrNotRunning)

	step := e.step("until test -e /stop; do sleep 0.02; done")
	var out bytes.Buffer
	p := sandbox.Process{Args: []string{"/bin/sh", "-c", "echo in; touch /stop; exit 5"}, Env: []string{"PATH=/bin"}, Cwd: "/", Stdout: &out}
	execErr := make(chan error, 1)
	var execRes *sandbox.Result
	res, err := e.r.Run(context.Background(), step, func() {
		go func() {
			var err error
			execRes, err = e.r.Exec(context.Background(), step.ID, p)
			execErr <- err
		}()
	})
	require.NoError(t, err)
	require.Zero(t, res.ExitCode)
	// The step may end, and take the process with it, before Exec has its status.
	if err := <-execErr; err == nil {
		require.Contains(t, []int{5, 137}, execRes.ExitCode)
	} else {
		require.ErrorIs(t, err, sandbox.ErrNotRunning)
	}
}

func TestTerminal(t *testing.T) {
	e := newEnv(t)
	step := e.step("test -t 0 && test -t 1 && echo terminal")
	step.Process.Terminal = true
	require.Contains(t, e.ok(step), "terminal")
}

func TestCancel(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	cause := errors.New("the user had enough")
	for _, script := range []string{"sleep 100", "while :; do :; done", "trap '' TERM INT; sleep 100 & wait"} {
		ctx, cancel := context.WithCancelCause(context.Background())
		var asked time.Time
		_, err := e.r.Run(ctx, e.step(script), func() {
			go func() {
				time.Sleep(50 * time.Millisecond)
				asked = time.Now()
				cancel(cause)
			}()
		})
		require.ErrorIs(t, err, cause, script)
		require.Less(t, time.Since(asked), time.Second, script)
	}
	for _, after := range []time.Duration{0, 5, 20, 40} {
		ctx, cancel := context.WithTimeoutCause(context.Background(), after*time.Millisecond, cause)
		_, err := e.r.Run(ctx, e.step("sleep 100"), nil)
		cancel()
		require.ErrorIs(t, err, cause)
	}
	e.settle()
	require.Empty(t, sandboxProcesses(t, e.r.cfg.StateDir))
}

// TestNothingIsLeft counts what the node has before and after.
func TestNothingIsLeft(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	e.ok(e.step("true")) // some things are made once
	e.settle()
	before := census(t, e.r.cfg.StateDir)
	for range 3 {
		e.ok(e.step("sleep 50 & echo x >/x"))
	}
	e.settle()
	require.Equal(t, before, census(t, e.r.cfg.StateDir))
}

func TestUnavailable(t *testing.T) {
	ctx := context.Background()
	require.NoError(t, Check(ctx, Config{RunscPath: runscPath(t)}))
	err := Check(ctx, Config{RunscPath: "/no/such/runsc"})
	var missing *sandbox.UnavailableError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, sandbox.GVisor, missing.Class)
	require.Contains(t, err.Error(), "/no/such/runsc")
}

// TestStockRunsc uses a runsc without kiln's additions.
func TestStockRunsc(t *testing.T) {
	real, dir := runscPath(t), t.TempDir()
	data, err := os.ReadFile(real)
	require.NoError(t, err)
	for name, program := range map[string][]byte{
		// The same program, but the method has another name.
		"StepProbe":    bytes.ReplaceAll(data, []byte("StepProbe"), []byte("StepQrobe")),
		"kiln-starter": []byte("#!/bin/sh\ntest $1 != kiln-starter || exit 128\nexec " + real + " \"$@\"\n"),
	} {
		require.NoError(t, os.WriteFile(dir+"/"+name, program, 0o755))
		err = Check(context.Background(), Config{RunscPath: dir + "/" + name})
		var missing *sandbox.UnavailableError
		require.ErrorAs(t, err, &missing)
		require.Contains(t, missing.Missing, name)
		require.Contains(t, missing.Fix, "make build")
	}
}

const (
	childEnv     = "KILN_TEST_GVISOR_CHILD"
	childWaitEnv = "KILN_TEST_GVISOR_CHILD_WAITS"
)

// TestRecovery kills a process in the middle of a step and makes another runtime
// on its state directory.
func TestRecovery(t *testing.T) {
	if dir := os.Getenv(childEnv); dir != "" {
		r, err := New(context.Background(), Config{RunscPath: runscPath(t), StateDir: dir + "/state"})
		require.NoError(t, err)
		step := (&env{lower: dir + "/lower", upper: dir + "/upper", work: dir + "/work"}).step("sleep 1000")
		_, _ = r.Run(context.Background(), step, func() {
			// Others are being started meanwhile, or wait.
			if os.Getenv(childWaitEnv) != "" {
				r.pool.making.Wait()
			}
			os.Stdout.WriteString("started\n")
		})
		return
	}
	for _, waits := range []string{"", "1"} {
		t.Run("waits="+waits, func(t *testing.T) { testRecovery(t, waits) })
	}
}

func testRecovery(t *testing.T, waits string) {
	e := newEnv(t)
	dir := filepath.Dir(e.lower)
	cmd := exec.Command(os.Args[0], "-test.run=^TestRecovery$")
	cmd.Env = append(os.Environ(), childEnv+"="+dir, childWaitEnv+"="+waits)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	buf := make([]byte, 8)
	_, err = io.ReadFull(out, buf)
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()

	r, err := New(context.Background(), Config{RunscPath: runscPath(t), StateDir: dir + "/state"})
	require.NoError(t, err)
	require.Empty(t, processesNaming(t, dir))
	require.Empty(t, mountsBelow(t, dir))
	entries, err := os.ReadDir(dir + "/state/steps")
	require.NoError(t, err)
	require.Empty(t, entries)
	e.r = r
	e.ok(e.step("true"))
	require.NoError(t, r.Close())
	require.Empty(t, mountsBelow(t, dir))
	e.r, err = New(context.Background(), Config{RunscPath: runscPath(t), StateDir: dir + "/state"})
	require.NoError(t, err)
}
