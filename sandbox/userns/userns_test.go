package userns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

func TestEcho(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "echo hello; id -u; hostname; cat")
	step.Process.Stdin = io.NopCloser(strings.NewReader("input"))
	out, code := run(t, r, step)
	require.Equal(t, "hello\n0\n"+sandbox.DefaultHostname+"\ninput", out)
	require.Zero(t, code)
	entries, err := os.ReadDir(step.Root.Upper)
	require.NoError(t, err)
	require.Len(t, entries, 1, "the layer holds what the step wrote only")
	entries, err = os.ReadDir(filepath.Join(step.Root.Upper, "etc")) // copied up for the mount points in it
	require.NoError(t, err)
	require.Empty(t, entries)
}

func BenchmarkRunTrue(b *testing.B) {
	r := newRuntime(b)
	step := newStep(b, "true")
	step.Limits.PIDs = 32768
	cpu := func() (sum float64) {
		for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
			var u unix.Rusage
			require.NoError(b, unix.Getrusage(who, &u))
			sum += float64(u.Utime.Nano()+u.Stime.Nano()) / 1e6
		}
		return sum
	}
	before := cpu()
	for b.Loop() {
		res, err := r.Run(context.Background(), step, nil)
		require.NoError(b, err)
		require.Zero(b, res.ExitCode)
	}
	b.ReportMetric((cpu()-before)/float64(b.N), "cpu-ms/op")
}

func TestExitCodeAndSignal(t *testing.T) {
	r := newRuntime(t)
	_, code := run(t, r, newStep(t, "exit 7"))
	require.Equal(t, 7, code)
	_, code = run(t, r, newStep(t, "sh -c 'kill -9 $$'; exit $?"))
	require.Equal(t, 128+9, code)

	step := newStep(t, "trap 'exit 42' TERM; echo up; while :; do sleep 0.05; done")
	signals := make(chan syscall.Signal, 1)
	step.Process.Signal = signals
	out, up := io.Pipe()
	step.Process.Stdout = up
	go func() {
		_, _ = out.Read(make([]byte, 16))
		signals <- syscall.SIGTERM
		_, _ = io.Copy(io.Discard, out)
	}()
	res, err := r.Run(context.Background(), step, nil)
	up.Close()
	require.NoError(t, err)
	require.Equal(t, 42, res.ExitCode)
}

func TestMissingProgram(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "")
	step.Process.Args = []string{"/no/such/program"}
	_, err := r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "/no/such/program")
}

func TestFilesOnDisk(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, `set -e
		echo x > /f; chown 33:34 /f; ln /f /hard; ln -s f /soft
		rm /bin/vi; mkdir /d; mkfifo /p; cp /bin/busybox /su; chmod 4755 /su`)
	out, code := run(t, r, step)
	require.Zero(t, code, out)
	stat := func(name string) (st unix.Stat_t) {
		require.NoError(t, unix.Lstat(filepath.Join(step.Root.Upper, name), &st))
		return st
	}
	f, hard := stat("f"), stat("hard")
	require.Equal(t, []uint32{33, 34}, []uint32{f.Uid, f.Gid})
	require.Equal(t, f.Ino, hard.Ino)
	require.Equal(t, uint64(2), uint64(f.Nlink))
	require.Zero(t, stat("d").Uid)
	require.Zero(t, stat("soft").Gid)
	require.Equal(t, uint32(unix.S_IFIFO), stat("p").Mode&unix.S_IFMT)
	require.Equal(t, uint32(unix.S_ISUID), stat("su").Mode&unix.S_ISUID)
	whiteout := stat("bin/vi")
	require.Equal(t, uint32(unix.S_IFCHR), whiteout.Mode&unix.S_IFMT)
	require.Zero(t, whiteout.Rdev)
}

func TestExtendedAttributes(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "touch /f")
	lower := filepath.Join(step.Root.Lower[0], "file")
	require.NoError(t, os.WriteFile(lower, nil, 0o755))
	require.NoError(t, unix.Setxattr(lower, "user.kiln", []byte("v"), 0))
	// cap_net_bind_service=ep
	capability := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	require.NoError(t, unix.Setxattr(lower, "security.capability", capability, 0))
	step.Process.Args[2] = "chmod 700 /file"
	out, code := run(t, r, step)
	require.Zero(t, code, out)
	got := make([]byte, 64)
	upper := filepath.Join(step.Root.Upper, "file")
	n, err := unix.Getxattr(upper, "user.kiln", got)
	require.NoError(t, err)
	require.Equal(t, "v", string(got[:n]))
	n, err = unix.Getxattr(upper, "security.capability", got)
	require.NoError(t, err)
	require.Equal(t, capability, got[:n], "file capabilities stay as an image has them")
}

func TestSetuidProgram(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "grep NoNewPrivs /proc/self/status; id -u; /bin/su root -c 'id -u'")
	step.Process.User = "www"
	root := step.Root.Lower[0]
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root::0:0::/:/bin/sh\nwww:x:33:34::/:/bin/sh\n"), 0o644))
	program, err := os.ReadFile(filepath.Join(root, "bin/busybox"))
	require.NoError(t, err)
	su := filepath.Join(root, "bin/su")
	require.NoError(t, os.Remove(su))
	require.NoError(t, os.WriteFile(su, program, 0o755))
	require.NoError(t, os.Chmod(su, 0o755|os.ModeSetuid))
	out, code := run(t, r, step)
	require.Zero(t, code, out)
	require.Equal(t, "NoNewPrivs:\t0\n33\n0\n", out)
}

func TestNoNewPrivileges(t *testing.T) {
	r := newRuntime(t)
	require.Contains(t, sh(t, r, "grep NoNewPrivs /proc/self/status"), "1")
}

func TestUserAndCwd(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "id -u; id -g; id -G; pwd; ls -ld .")
	step.Process.User = "www"
	step.Process.Cwd = "/made/for/step"
	out, code := run(t, r, step)
	require.Zero(t, code, out)
	require.True(t, strings.HasPrefix(out, "33\n34\n34 55\n/made/for/step\n"), out)
	require.DirExists(t, filepath.Join(step.Root.Upper, "made/for/step"))

	step = newStep(t, "true")
	step.Process.User = "nobody-there"
	_, err := r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "nobody-there")
}

func TestMounts(t *testing.T) {
	r := newRuntime(t)
	dir := openDir(t)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("content"), 0o644))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "etc"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "etc/hostname"), []byte("contained"), 0o644))
	require.NoError(t, os.Symlink("../../../../../etc/hostname", filepath.Join(dir, "out")))
	step := newStep(t, `set -e
		cat /ro/f /one /sub; echo
		! touch /ro/x 2>/dev/null
		echo made > /rw/made; chown 5:6 /rw/made
		stat -c %u:%a /tmpfs; echo y > /tmpfs/y
		stat -c %u:%g /ro/f /etc/hosts
		! mknod /tmpfs/null c 1 3 2>/dev/null
		echo ok > /dev/null; head -c 4 /dev/urandom | wc -c; test -c /dev/tty`)
	step.Mounts = []sandbox.Mount{
		{Destination: "/ro", Tree: sandbox.Tree{Lower: []string{dir}}},
		{Destination: "/rw", Tree: sandbox.Tree{Dir: dir}},
		{Destination: "/one", Tree: sandbox.Tree{Dir: dir}, Subpath: "f", Readonly: true},
		{Destination: "/sub", Tree: sandbox.Tree{Dir: dir}, Subpath: "out", Readonly: true},
		{Destination: "/tmpfs", Tree: sandbox.Tree{Tmpfs: &sandbox.Tmpfs{Size: 1 << 20}}},
	}
	out, code := run(t, r, step)
	require.Zero(t, code, out)
	require.Equal(t, "contentcontentcontained\n0:1777\n0:0\n0:0\n4\n", out)
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(filepath.Join(dir, "made"), &st))
	require.Equal(t, []uint32{5, 6}, []uint32{st.Uid, st.Gid})
	for _, stub := range []string{"ro", "rw", "one", "sub", "tmpfs"} {
		_, err := os.Lstat(filepath.Join(step.Root.Upper, stub))
		require.ErrorIs(t, err, os.ErrNotExist, stub)
	}
}

func TestNetworkNone(t *testing.T) {
	r := newRuntime(t)
	require.Equal(t, "lo\n", sh(t, r, "ls /sys/class/net"))
	step := newStep(t, "true")
	step.Network = sandbox.NetworkEgress
	_, err := r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "egress")
}

func TestCancelKillsEverything(t *testing.T) {
	r := newRuntime(t)
	cause := errors.New("no longer wanted")
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 15 * time.Millisecond, 30 * time.Millisecond, 300 * time.Millisecond} {
		ctx, cancel := context.WithCancelCause(context.Background())
		step := newStep(t, "trap '' TERM INT HUP; (setsid sleep 1000 &) ; sleep 1000")
		var cancelled time.Time
		timer := time.AfterFunc(after, func() { cancelled = time.Now(); cancel(cause) })
		_, err := r.Run(ctx, step, nil)
		took := time.Since(cancelled)
		timer.Stop()
		require.ErrorIs(t, err, cause)
		require.Less(t, took, 1500*time.Millisecond, "after %v", after)
	}
}

func TestDaemonDiesWithStep(t *testing.T) {
	r := newRuntime(t)
	start := time.Now()
	out := sh(t, r, "(setsid sleep 1000 >/dev/null 2>&1 &); (sleep 1000 &); echo done")
	require.Equal(t, "done\n", out)
	require.Less(t, time.Since(start), 20*time.Second)
}

func TestExecAndRanges(t *testing.T) {
	r := newRuntime(t)
	type up struct {
		step *sandbox.Step
		done chan error
	}
	start := func(owner string) up {
		u := up{newStep(t, "sleep 1000"), make(chan error, 1)}
		u.step.Owner = owner
		started := make(chan struct{})
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(func() { cancel(); <-u.done })
		go func() {
			_, err := r.Run(ctx, u.step, func() { close(started) })
			u.done <- err
		}()
		<-started
		return u
	}
	hostID := func(u up) string {
		var out bytes.Buffer
		res, err := r.Exec(context.Background(), u.step.ID, sandbox.Process{
			Args: []string{"/bin/cat", "/proc/self/uid_map"}, Cwd: "/", Stdout: &out})
		require.NoError(t, err)
		require.Zero(t, res.ExitCode)
		return strings.Fields(out.String())[1]
	}
	a, a2, b := start("a"), start("a"), start("b")
	require.NotEqual(t, hostID(a), hostID(a2), "not even steps of one build have the same IDs")
	require.NotEqual(t, hostID(a), hostID(b))
	require.GreaterOrEqual(t, hostID(a), fmt.Sprint(FirstID))

	// What runs in the cgroup has IDs of the range on the node.
	procs, err := os.ReadFile(filepath.Join(r.cgroupDir(filepath.Join(r.cgroupParent(), r.running[a.step.ID].cell.name)), "cgroup.procs"))
	require.NoError(t, err)
	var st unix.Stat_t
	require.NoError(t, unix.Stat("/proc/"+strings.Fields(string(procs))[0], &st))
	require.Equal(t, hostID(a), fmt.Sprint(st.Uid))

	res, err := r.Exec(context.Background(), a.step.ID, sandbox.Process{Args: []string{"/bin/sh", "-c", "exit 3"}, Cwd: "/"})
	require.NoError(t, err)
	require.Equal(t, 3, res.ExitCode)
	_, err = r.Exec(context.Background(), "no-such-step", sandbox.Process{Args: []string{"true"}, Cwd: "/"})
	require.ErrorIs(t, err, sandbox.ErrNotRunning)
}

func TestTerminal(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "test -t 0 && test -t 1 && read x && echo got $x; stty size")
	var out bytes.Buffer
	resize := make(chan sandbox.WindowSize, 1)
	resize <- sandbox.WindowSize{Rows: 33, Cols: 77}
	in, typed := io.Pipe()
	step.Process.Terminal, step.Process.Stdin, step.Process.Stdout, step.Process.Resize = true, in, &out, resize
	go func() {
		time.Sleep(500 * time.Millisecond)
		_, _ = io.WriteString(typed, "word\n")
	}()
	res, err := r.Run(context.Background(), step, nil)
	require.NoError(t, err)
	require.Zero(t, res.ExitCode, out.String())
	require.Contains(t, out.String(), "got word")
	require.Contains(t, out.String(), "33 77")
}

func TestCheck(t *testing.T) {
	census(t)
	dir := openDir(t)
	require.NoError(t, os.Chmod(dir, 0o700))
	require.NoError(t, Check(context.Background(), testConfig(dir)))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestCheckTellsWhatIsMissing(t *testing.T) {
	census(t)
	cfg := testConfig("/proc/self")
	require.ErrorContains(t, Check(context.Background(), cfg), "make directory for the check")

	// A node that lets nobody make a directory of ID ranges.
	cfg = testConfig(openDir(t))
	cfg.UIDRangeDir = "/proc/self/ranges"
	var missing *sandbox.UnavailableError
	require.ErrorAs(t, Check(context.Background(), cfg), &missing)
	require.Equal(t, "a sandbox that starts", missing.Missing)
	require.NotEmpty(t, missing.Fix)
}
