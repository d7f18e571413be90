package escape

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var _ = register(
	entry{
		ID: "escape/image-symlinks", Threat: "An image has symlinks to directories of the node in place of /dev, /dev/null, /dev/pts, /proc, /sys and the files of /etc that a sandbox mounts.",
		Severity: escapesToNode, Test: imageSymlinks,
		Without: "resolving paths inside of the root", Off: func(t *testing.T, e *env) bool {
			w := newBait(t, e)
			root := e.dir(t)
			require.NoError(t, os.Symlink(w.dir, filepath.Join(root, "dev")))
			before := w.look(t)
			// What a runtime does that joins names: make the mount point, and take it away.
			require.NoError(t, os.MkdirAll(filepath.Join(root, "dev/pts"), 0o755))
			require.NoError(t, os.Remove(filepath.Join(root, "dev/pts")))
			return w.look(t) != before
		},
	},
	entry{
		ID: "escape/mount-point-race", Threat: "A step of another stage swaps a directory of a shared cache for a symlink while a mount point is made in it, or taken away again.",
		Severity: escapesToNode, Test: mountPointRace,
		Without: "holding directories by descriptors", Off: mountPointRaceOff,
	},
	entry{
		ID: "escape/mount-paths", Threat: "Sources, targets and IDs of mounts have .. or lead through symlinks to the node.",
		Severity: escapesToNode, Test: mountPaths,
		Without: "resolving paths inside of the tree", Off: func(t *testing.T, e *env) bool {
			tree := e.dir(t)
			require.NoError(t, os.Symlink(filepath.Dir(e.CanaryFile), filepath.Join(tree, "link")))
			data, err := os.ReadFile(filepath.Join(tree, "link", filepath.Base(e.CanaryFile)))
			return err == nil && strings.Contains(string(data), e.Canary)
		},
	},
	entry{
		ID: "escape/workdir-symlink", Threat: "The working directory of a step is a symlink to a directory of the node, in which the runtime makes what is missing.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			w := newBait(t, e)
			before := w.look(t)
			evil := e.dir(t)
			require.NoError(t, os.Symlink(w.dir, filepath.Join(evil, "link")))
			for _, r := range e.Builds(t, []build{
				{Contexts: map[string]string{"evil": evil}, Dockerfile: "FROM tools\nCOPY --from=evil / /\nWORKDIR /link/made\nRUN cat ../canary ./canary /link/canary; true\n"},
				{Contexts: map[string]string{"evil": evil}, Dockerfile: "FROM tools\nCOPY --from=evil / /\nCOPY --from=tools etc/passwd /link/copied\nRUN cat /link/canary; true\n"},
			}) {
				e.CheckNode(t, r)
			}
			require.Equal(t, before, w.look(t))
		},
	},
)

// bait is a directory of the node that mount points would be made in, and that has
// what would be taken for a mount point.
type bait struct{ dir string }

func newBait(t *testing.T, e *env) bait {
	t.Helper()
	dir := filepath.Join(e.dir(t), "bait")
	for _, d := range []string{"pts", "shm", "mqueue", "y", "y/z", "sys", "etc"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for _, f := range []string{"null", "zero", "hosts", "resolv.conf", "console", "ptmx"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, f), nil, 0o644))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "canary"), []byte(e.Canary), 0o600))
	return bait{dir}
}

// look tells what is there.
func (b bait) look(t *testing.T) string {
	t.Helper()
	var out strings.Builder
	require.NoError(t, filepath.WalkDir(b.dir, func(path string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(path, &st))
		var data []byte
		if d.Type().IsRegular() {
			data, err = os.ReadFile(path)
			require.NoError(t, err)
		}
		fmt.Fprintf(&out, "%s %d %o %d %d %d %q\n", path, st.Dev, st.Mode, st.Uid, st.Gid, st.Ino, data)
		return nil
	}))
	return out.String()
}

// imageSymlinks has one image for each way.
func imageSymlinks(t *testing.T, e *env) {
	w := newBait(t, e)
	before := w.look(t)
	var list []build
	up := strings.Repeat("../", 12) + strings.TrimPrefix(w.dir, "/")
	for _, links := range []map[string]string{
		{"dev": w.dir}, {"proc": w.dir}, {"sys": w.dir}, {"dev": up}, {"etc": w.dir},
		{"dev/null": w.dir + "/null", "dev/pts": w.dir + "/pts", "dev/shm": w.dir + "/shm", "dev/mqueue": w.dir + "/mqueue", "dev/console": w.dir + "/made"},
		{"etc/hosts": w.dir + "/hosts", "etc/resolv.conf": w.dir + "/made"},
		{"proc/self": w.dir, "sys/fs": w.dir}, {"dev": "/proc/self/fd", "etc/resolv.conf": "/dev/../" + up + "/made"},
	} {
		root := filepath.Join(e.dir(t), "root")
		require.NoError(t, exec.Command("cp", "-a", e.tools, root).Run())
		for name, to := range links {
			path := filepath.Join(root, name)
			require.NoError(t, os.RemoveAll(path))
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, os.Symlink(to, path))
		}
		list = append(list, build{
			Dockerfile: "FROM evil\nRUN [\"/bin/sh\", \"-c\", \"echo ran; echo written > /dev/null; echo written > /dev/shm/made; cat /dev/canary /proc/canary /sys/canary /etc/canary /etc/resolv.conf; true\"]\n",
			Contexts:   map[string]string{"evil": root},
		})
	}
	for _, r := range e.Builds(t, list) {
		e.CheckNode(t, r)
	}
	require.Equal(t, before, w.look(t), "something was made, removed or mounted there")
}

// mountPointRace has one step swap /c/a, which is a directory, and /c/b, which is a
// symlink to the node, for as long as others have mounts in /c/a.
func mountPointRace(t *testing.T, e *env) {
	w := newBait(t, e)
	before := w.look(t)
	cache := "--mount=type=cache,id=race-" + random(t) + ",target=/c"
	unique := random(t)
	swapping := make(chan struct{})
	var once sync.Once
	var swapped result
	var all sync.WaitGroup
	all.Go(func() {
		swapped = e.Build(t, build{
			Dockerfile: "FROM tools\nRUN " + cache + " mkdir -p /c/a/y && ln -s " + w.dir + " /c/b && /bin/attack swap /c/a /c/b /c/stop\n",
			NoExport:   true,
			Meets:      "swap",
			Log: func(text string) {
				if strings.Contains(text, "swapping") {
					once.Do(func() { close(swapping) })
				}
			},
		})
		once.Do(func() { close(swapping) })
	})
	<-swapping
	for round := range 3 {
		var steps strings.Builder
		for i := range 4 {
			fmt.Fprintf(&steps, "FROM tools AS s%d\nRUN %s --mount=type=tmpfs,target=/c/a/y/z --mount=type=tmpfs,target=/c/a/new/dir : %s %d; cat /c/a/canary; echo written > /c/a/y/z/made; true\n", i, cache, unique, round)
		}
		steps.WriteString("FROM tools\n")
		for i := range 4 {
			fmt.Fprintf(&steps, "COPY --from=s%d /etc/passwd /p%d\n", i, i)
		}
		e.CheckNode(t, e.Build(t, build{Dockerfile: steps.String(), Meets: "steps"}))
	}
	stopped := e.Build(t, build{Dockerfile: "FROM tools\nRUN " + cache + " touch /c/stop\n", NoExport: true, Meets: "steps"})
	all.Wait()
	require.NoError(t, stopped.Err)
	require.NoError(t, swapped.Err, swapped.Log)
	require.Contains(t, swapped.Log, "swapped ")
	require.Equal(t, before, w.look(t), "something was made, removed or mounted there")
}

// mountPointRaceOff makes and removes mount points as a program does that joins names.
func mountPointRaceOff(t *testing.T, e *env) bool {
	w := newBait(t, e)
	root := e.dir(t)
	a, b := filepath.Join(root, "a"), filepath.Join(root, "b")
	require.NoError(t, os.MkdirAll(filepath.Join(a, "y/z"), 0o755))
	require.NoError(t, os.Symlink(w.dir, b))
	before := w.look(t)
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
			}
		}
	})
	defer func() {
		close(stop)
		swapper.Wait()
	}()
	for range 10000 {
		if st, err := os.Lstat(a); err != nil || !st.IsDir() {
			continue // it is checked
		}
		runtime.Gosched()
		_ = os.MkdirAll(filepath.Join(a, "y/z"), 0o755)
		_ = os.Remove(filepath.Join(a, "y/z"))
		if _, err := os.Stat(filepath.Join(w.dir, "y/z")); err != nil || w.look(t) != before {
			return true
		}
	}
	return false
}

func mountPaths(t *testing.T, e *env) {
	w := newBait(t, e)
	before := w.look(t)
	evil := e.dir(t)
	require.NoError(t, os.Symlink(w.dir, filepath.Join(evil, "link")))
	require.NoError(t, os.Symlink(e.CanaryFile, filepath.Join(evil, "file")))
	up := strings.Repeat("../", 14) + strings.TrimPrefix(w.dir, "/")
	var list []build
	for _, m := range []string{
		"type=cache,id=" + up + ",target=/m", "type=cache,id=" + w.dir + ",target=/m", "type=cache,id=..,target=/m", "type=cache,target=/m/" + up,
		"type=cache,from=evil,source=link,target=/m", "type=bind,from=evil,source=link,target=/m", "type=bind,from=evil,source=link,target=/m,rw",
		"type=bind,from=evil,source=file,target=/m", "type=bind,from=evil,source=" + up + ",target=/m", "type=bind,from=evil,source=link/..,target=/m",
		"type=tmpfs,target=/" + up, "type=tmpfs,target=/proc/self/fd/3", "type=tmpfs,target=/proc/1/root" + w.dir,
		"type=bind,from=evil,target=/dev/../../.." + w.dir, "type=bind,from=evil,source=.,target=/sys/../../m",
	} {
		list = append(list, build{
			Dockerfile: "FROM tools\nRUN --mount=" + m + " ls -la /m; cat /m /m/canary /m/link/canary /m/file " + e.CanaryFile + "; echo written > /m/made; echo written > " + w.dir + "/made; true\n",
			Contexts:   map[string]string{"evil": evil},
		})
	}
	for i, r := range e.Builds(t, list) {
		e.CheckNode(t, r)
		require.Equal(t, before, w.look(t), "%s changed the node", list[i].Dockerfile)
	}
}
