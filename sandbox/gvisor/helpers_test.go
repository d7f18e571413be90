package gvisor

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// chroot runs a script with root as its root, on the node.
func chroot(t *testing.T, root, script string) {
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Env = []string{"PATH=/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
}

// sandboxProcesses is processesNaming without those that start sandboxes.
func sandboxProcesses(t *testing.T, dir string) []string {
	return slices.DeleteFunc(processesNaming(t, dir), func(c string) bool { return strings.Contains(c, " kiln-starter ") })
}

// processesNaming returns the command lines of live processes that name dir.
func processesNaming(t *testing.T, dir string) []string {
	var found []string
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	for _, n := range names {
		data, err := os.ReadFile(n)
		if err == nil && strings.Contains(string(data), dir+"/") {
			found = append(found, strings.ReplaceAll(string(data), "\x00", " "))
		}
	}
	return found
}

func mountsBelow(t *testing.T, dir string) []string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	var found []string
	for _, line := range strings.Split(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// census lists the mounts and files below dir, the processes that name it, our
// children, and how many descriptors are open.
func census(t *testing.T, dir string) map[string]any {
	files := []string{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		files = append(files, p)
		return err
	}))
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	children := ""
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	require.NoError(t, err)
	for _, c := range tasks {
		data, _ := os.ReadFile(c)
		children += string(data)
	}
	return map[string]any{
		"mounts": mountsBelow(t, dir), "files": files, "processes": processesNaming(t, dir), "descriptors": len(fds), "children": children,
	}
}

// program builds one of testdata into /bin of what steps begin with.
func (e *env) program(name string) {
	e.t.Helper()
	build := exec.Command("go", "build", "-o", e.lower+"/bin/"+name, "./testdata/"+name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(e.t, err, string(out))
}
