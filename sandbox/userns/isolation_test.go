package userns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// waiting returns the sandboxes that r has made ahead, when there are as many as
// there will be.
func waiting(t *testing.T, r *Runtime) []*cell {
	t.Helper()
	var cells []*cell
	require.Eventually(t, func() bool {
		r.pool.mu.Lock()
		defer r.pool.mu.Unlock()
		cells = append([]*cell{}, r.pool.ready[sandbox.NetworkNone]...)
		return len(cells) == ahead
	}, 10*time.Second, 5*time.Millisecond)
	return cells
}

func TestSandboxesHaveNothingInCommon(t *testing.T) {
	r := newRuntime(t)
	var kinds = []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"}
	seen := map[string]bool{}
	for _, k := range kinds {
		ns, err := os.Readlink("/proc/self/ns/" + k)
		require.NoError(t, err)
		seen[ns] = true
	}
	// Names of namespaces are used again, so that all must be there at once.
	var all, printed sync.WaitGroup
	in, release := io.Pipe()
	outs := make([]bytes.Buffer, 4)
	for i := range outs {
		step := newStep(t, `set -e
			test -z "$(ls -A /dev/shm /dev/mqueue | grep -v :)"
			test ! -e /dev/left; echo x > /dev/left; echo x > /dev/shm/left; echo x > /left
			for n in `+strings.Join(kinds, " ")+`; do readlink /proc/self/ns/$n; done
			tr -s ' ' < /proc/self/uid_map | cut -d' ' -f3; cat`)
		lines := len(kinds) + 1
		step.Process.Stdin = io.NopCloser(in)
		printed.Add(1)
		step.Process.Stdout = writerFunc(func(b []byte) (int, error) {
			if lines -= bytes.Count(b, []byte("\n")); lines == 0 {
				printed.Done()
			}
			return outs[i].Write(b)
		})
		all.Go(func() {
			res, err := r.Run(context.Background(), step, nil)
			require.NoError(t, err)
			require.Zero(t, res.ExitCode)
		})
	}
	printed.Wait()
	require.NoError(t, release.Close())
	all.Wait()
	for i := range outs {
		for line := range strings.FieldsSeq(outs[i].String()) {
			require.False(t, seen[line], "%s is there already", line)
			seen[line] = true
		}
	}
	require.Len(t, seen, len(kinds)+len(outs)*(len(kinds)+1))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestWaitingSandboxHasNothingOfTheNode(t *testing.T) {
	r := newRuntime(t)
	for _, c := range waiting(t, r) {
		proc := fmt.Sprintf("/proc/%d", c.proc.Pid)
		fds, err := os.ReadDir(filepath.Join(proc, "fd"))
		require.NoError(t, err)
		require.Len(t, fds, 4, "standard streams and its socket")
		for i := range 3 {
			to, err := os.Readlink(filepath.Join(proc, "fd", strconv.Itoa(i)))
			require.NoError(t, err)
			require.Equal(t, "/dev/null", to)
		}
		status, err := os.ReadFile(filepath.Join(proc, "status"))
		require.NoError(t, err)
		id := c.ids.first
		require.Contains(t, string(status), fmt.Sprintf("\nUid:\t%d\t%d\t%d\t%d\nGid:\t%d\t%d\t%d\t%d\n", id, id, id, id, id, id, id, id))
		require.Contains(t, string(status), "\nGroups:\t \n")
		environ, err := os.ReadFile(filepath.Join(proc, "environ"))
		require.NoError(t, err)
		require.Empty(t, environ)
		info, err := os.ReadFile(filepath.Join(proc, "mountinfo"))
		require.NoError(t, err)
		for line := range strings.Lines(string(info)) {
			at := "/" + strings.Split(strings.Fields(line)[4], "/")[1]
			require.Contains(t, []string{"/", rootProc, rootDev, rootSys, hostDev, hostProc}, at)
		}
	}
}

func TestStepHasNothingOfOurs(t *testing.T) {
	r := newRuntime(t)
	out := sh(t, r, `ls /proc/self/fd | wc -l; ls -l /proc/1/fd 2>/dev/null | grep -c socket
		readlink /proc/1/exe; cat /proc/net/unix | wc -l
		ls -d /new /hostproc /hostdev 2>/dev/null
		grep -cE 'kiln|hostproc|hostdev' /proc/self/mountinfo
		# Out of a root that has another one around it.
		mkdir -p /jail/bin; cp /bin/busybox /jail/bin/
		chroot /jail /bin/busybox sh -c 'cd ../../../..; /bin/busybox ls / | /bin/busybox tr "\n" " "'
		ls /../../.. | tr '\n' ' '; ls /proc/1/root/.. | tr '\n' ' '
		umount / 2>&1 | grep -c 'not permitted'; umount /proc 2>&1 | grep -c 'not permitted'
		unshare -m true 2>&1 | grep -c 'not permitted'`)
	root := "bin dev etc jail proc sys tmp "
	require.Equal(t, "4\n0\n/bin/busybox\n1\n0\nbin "+root+root+"1\n1\n1\n", out, "ls has a descriptor of its own")
}

// TestDevicesAreLimited puts a process of the node into the cgroup of a sandbox, as a
// step has no device nodes to try.
func TestDevicesAreLimited(t *testing.T) {
	r := newRuntime(t)
	procs := fmt.Sprintf("/sys/fs/cgroup/unified%s/%s/cgroup.procs", r.cgroupParent(), waiting(t, r)[0].name)
	if _, err := os.Stat(procs); err != nil {
		procs = strings.Replace(procs, "/unified", "", 1)
	}
	dir := openDir(t)
	require.NoError(t, unix.Mknod(filepath.Join(dir, "disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(1, 3))))
	out, err := exec.Command("/bin/sh", "-c", "echo $$ > "+procs+`
		for d in /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/ptmx; do : < $d || echo no $d; done
		for d in /dev/kmsg /dev/mem /dev/net/tun /dev/fuse `+dir+`/disk; do test ! -e $d || (: < $d) 2>&1 | grep -q 'not permitted' || echo $d; done
		mknod `+dir+`/made c 1 3; : < `+dir+`/made`).CombinedOutput()
	require.NoError(t, err)
	require.Empty(t, string(out))
}

func TestSandboxThatWasKilledServesNoStep(t *testing.T) {
	r := newRuntime(t)
	for _, c := range waiting(t, r) {
		require.NoError(t, c.proc.Kill())
		<-c.ended
	}
	require.Equal(t, "ok\n", sh(t, r, "echo ok"))
}

func TestZygoteThatWasKilledIsReplaced(t *testing.T) {
	r := newRuntime(t)
	waiting(t, r)
	r.zygote.mu.Lock()
	r.zygote.end()
	r.zygote.mu.Unlock()
	for range ahead + 2 {
		require.Equal(t, "ok\n", sh(t, r, "echo ok"))
	}
}

func TestSandboxesThatNobodyNeedsGo(t *testing.T) {
	r := newRuntime(t)
	cells := waiting(t, r)
	require.NoError(t, r.pool.empty())
	for _, c := range cells {
		require.False(t, c.alive())
		require.NoDirExists(t, r.cgroupDir(filepath.Join(r.cgroupParent(), c.name)))
	}
	require.Empty(t, r.ranges.taken)
	require.Equal(t, "ok\n", sh(t, r, "echo ok"))
}

func TestCancelAtAnyMoment(t *testing.T) {
	r := newRuntime(t)
	cause := errors.New("no longer wanted")
	for i := range 60 {
		ctx, cancel := context.WithCancelCause(context.Background())
		timer := time.AfterFunc(time.Duration(i)*150*time.Microsecond, func() { cancel(cause) })
		if i%2 == 0 {
			require.NoError(t, r.pool.empty()) // so that it makes its own
		}
		step := newStep(t, "sleep 1000")
		_, err := r.Run(ctx, step, nil)
		require.ErrorIs(t, err, cause)
		timer.Stop()
		require.NoError(t, os.RemoveAll(filepath.Dir(step.Root.Upper)), "nothing of it is mounted")
	}
}

func TestExecWhileTheStepEnds(t *testing.T) {
	r := newRuntime(t)
	for i := range 8 {
		step := newStep(t, fmt.Sprintf("sleep 0.0%d", i%4))
		started, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			_, err := r.Run(context.Background(), step, func() { close(started) })
			ended <- err
		}()
		<-started
		for {
			res, err := r.Exec(context.Background(), step.ID, sandbox.Process{Args: []string{"/bin/true"}, Cwd: "/"})
			if err != nil {
				require.ErrorIs(t, err, sandbox.ErrNotRunning)
				break
			}
			require.Contains(t, []int{0, 128 + 9}, res.ExitCode)
		}
		require.NoError(t, <-ended)
	}
}

func TestFindingTheProgram(t *testing.T) {
	r := newRuntime(t)
	one := func(args []string, env ...string) (string, error) {
		step := newStep(t, "")
		step.Process.Args, step.Process.Env, step.Process.Cwd = args, env, "/bin"
		require.NoError(t, os.MkdirAll(filepath.Join(step.Root.Upper, "dir/echo"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(step.Root.Upper, "text"), []byte("x"), 0o644))
		var out bytes.Buffer
		step.Process.Stdout = &out
		_, err := r.Run(context.Background(), step, nil)
		return out.String(), err
	}
	for name, c := range map[string]struct {
		args, env []string
		want      string
		err       string
	}{
		"on the path":               {[]string{"echo", "a"}, []string{"PATH=/none:/text:/dir:/bin"}, "a\n", ""},
		"the last path counts":      {[]string{"echo", "a"}, []string{"PATH=/bin", "PATH=/none"}, "", "executable file not found"},
		"not on the path":           {[]string{"nothing"}, []string{"PATH=/bin"}, "", `"nothing": executable file not found`},
		"no path":                   {[]string{"echo"}, nil, "", "executable file not found"},
		"relative to its directory": {[]string{"./echo", "a"}, nil, "a\n", ""},
		"a relative path":           {[]string{"echo", "a"}, []string{"PATH=."}, "", "executable file not found"},
		"a directory":               {[]string{"/dir"}, nil, "", "permission denied"},
		"not executable":            {[]string{"/text"}, nil, "", "permission denied"},
		"empty":                     {[]string{""}, []string{"PATH=/bin"}, "", "executable file not found"},
		"a variable without name":   {[]string{"echo"}, []string{"=x"}, "", "NAME=value"},
		"a variable without value":  {[]string{"echo"}, []string{"PATH"}, "", "NAME=value"},
	} {
		out, err := one(c.args, c.env...)
		if c.err != "" {
			require.ErrorContains(t, err, c.err, name)
			continue
		}
		require.NoError(t, err, name)
		require.Equal(t, c.want, out, name)
	}
}

func TestLimitsHostnameAndShm(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "ulimit -n; ulimit -c; hostname; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; touch /x 2>/dev/null || echo refused")
	step.Process.Rlimits = []sandbox.Rlimit{{Type: "RLIMIT_NOFILE", Soft: 64, Hard: 64}, {Type: "RLIMIT_CORE"}}
	step.Hostname, step.Limits.ShmBytes, step.ReadonlyRoot = "builder", 1<<20, true
	for _, d := range []string{"etc/hosts", "etc/resolv.conf"} {
		require.NoError(t, os.WriteFile(filepath.Join(step.Root.Lower[0], d), nil, 0o644))
	}
	out, code := run(t, r, step)
	require.Zero(t, code, out)
	require.Equal(t, "64\n0\nbuilder\n1024\nrefused\n", out)
	step = newStep(t, "true")
	step.Process.Rlimits = []sandbox.Rlimit{{Type: "RLIMIT_NONE"}}
	_, err := r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "RLIMIT_NONE")
}

func TestMountPointsStayInTheStep(t *testing.T) {
	r := newRuntime(t)
	dir := openDir(t)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("content"), 0o644))
	at := func(destination, subpath string, links ...string) (string, error) {
		step := newStep(t, "cat "+filepath.Join(destination, "f")+" || cat "+destination)
		for i := 0; i < len(links); i += 2 {
			require.NoError(t, os.Symlink(links[i+1], filepath.Join(step.Root.Lower[0], links[i])))
		}
		step.Mounts = []sandbox.Mount{{Destination: destination, Tree: sandbox.Tree{Dir: dir}, Subpath: subpath}}
		var out bytes.Buffer
		step.Process.Stdout = &out
		_, err := r.Run(context.Background(), step, nil)
		return out.String(), err
	}
	for name, c := range map[string]struct {
		destination, subpath string
		links                []string
		err                  string
	}{
		"a missing directory":              {"/a/b/c", "", nil, ""},
		"a file in a missing directory":    {"/a/b/c", "f", nil, ""},
		"a symlink to a directory":         {"/l", "", []string{"l", "tmp"}, ""},
		"below a symlink out of the root":  {"/l/x", "", []string{"l", "../../../../tmp"}, ""},
		"a symlink to nothing":             {"/l", "", []string{"l", "/none"}, "no such file"},
		"below a symlink to nothing":       {"/l/x", "", []string{"l", "/none"}, "no such file"},
		"through the root of a process":    {"/l/x", "", []string{"l", "/proc/1/root"}, "too many levels"},
		"into /proc":                       {"/proc/sys", "", nil, "nothing can be mounted in /proc"},
		"into /proc, spelt in another way": {"/tmp/../proc/sys", "", nil, "nothing can be mounted in /proc"},
		"a directory on a file":            {"/bin/busybox", "", nil, "mount /bin/busybox"},
		"a file on a directory":            {"/tmp", "f", nil, "mount /tmp"},
	} {
		out, err := at(c.destination, c.subpath, c.links...)
		if c.err != "" {
			require.ErrorContains(t, err, c.err, name)
			continue
		}
		require.NoError(t, err, name)
		require.Equal(t, "content", out, name)
	}

	// What must be a directory of its own is not mounted through a symlink.
	step := newStep(t, "true")
	require.NoError(t, os.Remove(filepath.Join(step.Root.Lower[0], "proc")))
	require.NoError(t, os.Symlink("tmp", filepath.Join(step.Root.Lower[0], "proc")))
	_, err := r.Run(context.Background(), step, nil)
	require.ErrorIs(t, err, unix.ELOOP)
	require.ErrorContains(t, err, "mount /proc")
}
