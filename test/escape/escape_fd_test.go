package escape

import (
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

var _ = register(
	entry{
		ID: "escape/fd-workdir", Threat: "A step's working directory is /proc/self/fd/N, to start in a directory that the runtime left open.",
		Severity: escapesToNode, Test: fdWorkdir,
		Without: "closing descriptors, and with the node's root", Off: fdLeft,
	},
	entry{
		ID: "escape/fd-allow-list", Threat: "A step uses descriptors that the runtime or the agent left to it.",
		Severity: escapesToNode, Test: fdAllowList,
		Without: "closing descriptors, and with the node's root", Off: fdLeft,
	},
	entry{
		ID: "escape/chroot", Threat: "A step leaves a chroot that it has made inside its root, and goes on to the node's root.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("chroot", e.CanaryFile)})
			e.CheckNode(t, r)
		},
		Without: "pivot_root, in a chroot",
		Off: func(t *testing.T, e *env) bool {
			root := filepath.Join(e.dir(t), "root")
			require.NoError(t, exec.Command("cp", "-a", e.tools, root).Run())
			out, err := exec.Command("chroot", root, "/bin/attack", "chroot", e.CanaryFile).CombinedOutput()
			require.NoError(t, err)
			return strings.Contains(string(out), e.Canary)
		},
	},
	entry{
		ID: "escape/open-by-handle", Threat: "A step opens a file of the node by its handle, which it has guessed.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			kind, handle := e.canaryHandle(t)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN --mount=type=cache,target=/cache /bin/attack handle " + kind + " " + handle + "\n"})
			e.CheckNode(t, r)
			require.Contains(t, r.Log, "handle at /cache: ")
		},
		Without: "the user namespace and the limit of capabilities",
		Off: func(t *testing.T, e *env) bool {
			kind, handle := e.canaryHandle(t)
			out := e.runRaw(t, raw{Node: true, Change: privileged}, "/bin/attack", "handle", kind, handle)
			return strings.Contains(out, e.Canary)
		},
	},
	entry{
		ID: "escape/device-in-image", Threat: "A step opens device nodes of the node's memory, log and disks that came with a layer.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			r := e.Build(t, build{
				Dockerfile: "FROM tools\nADD devices.tar /\nRUN ls -l /device-*; /bin/attack open /device-mem /device-kmsg /device-disk /device-tty\n",
				Files:      map[string]string{"devices.tar": tarOfDevices(t)},
			})
			require.NotContains(t, r.Log, "opened")
			if r.Err == nil {
				require.Contains(t, r.Log, "/device-disk: ", "it was tried")
			}
		},
		Without: "the sandbox, in a privileged container",
		Off: func(t *testing.T, e *env) bool {
			out := e.runRaw(t, raw{Node: true, Change: privileged, Root: func(root string) {
				require.NoError(t, unix.Mknod(filepath.Join(root, "device-disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(254, 0))))
				require.NoError(t, unix.Mknod(filepath.Join(root, "device-kmsg"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 11))))
			}}, "/bin/attack", "open", "/device-disk", "/device-kmsg")
			return strings.Contains(out, "opened /device-")
		},
	},
	entry{
		ID: "escape/devices", Threat: "A step finds devices of the node in /dev.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack(append([]string{"open"}, nodeDevices...)...), NoExport: true})
			for line := range strings.Lines(r.Log) {
				if f := strings.Fields(line); f[0] == "opened" {
					// gVisor has these two, of its own kernel.
					require.True(t, e.Class == sandbox.GVisor && (f[1] == "/dev/fuse" || f[1] == "/dev/net/tun"), line)
				}
			}
		},
		Without: "a /dev of its own, in a privileged container",
		Off: func(t *testing.T, e *env) bool {
			out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) {
				privileged(s)
				for i, m := range s.Mounts {
					if m.Destination == "/dev" {
						s.Mounts[i] = specs.Mount{Destination: "/dev", Type: "bind", Source: "/dev", Options: []string{"rbind", "rslave"}}
					}
				}
			}}, append([]string{"/bin/attack", "open"}, nodeDevices...)...)
			return strings.Contains(out, "opened")
		},
	},
	entry{
		ID: "escape/setuid-on-disk", Threat: "A step makes a program with the set-user-ID bit of root, for a user of the node to run it out of the build store.",
		Severity: escapesToNode, Test: setuidOnDisk,
		Without: "the private directory of the store",
		Off: func(t *testing.T, e *env) bool {
			dir, err := os.MkdirTemp("/tmp", "kiln-escape-suid-")
			require.NoError(t, err)
			defer os.RemoveAll(dir)
			require.NoError(t, os.Chmod(dir, 0o755))
			program := filepath.Join(dir, "suid")
			require.NoError(t, exec.Command("cp", filepath.Join(e.tools, "bin/attack"), program).Run())
			require.NoError(t, unix.Chmod(program, 0o4755))
			return strings.Contains(runAsNobody(program, "read", e.CanaryFile), e.Canary)
		},
	},
)

// attack is a step that runs an attack as its only process.
func attack(args ...string) string {
	return `RUN ["/bin/attack", "` + strings.Join(args, `", "`) + "\"]\n"
}

// fdWorkdir tries all descriptors at once; a step that cannot start is as good as one
// that finds nothing.
func fdWorkdir(t *testing.T, e *env) {
	var list []build
	for n := 3; n < 11; n++ {
		list = append(list, build{Dockerfile: fmt.Sprintf("FROM tools\nWORKDIR /proc/self/fd/%d\n%s", n, attack("fdread", e.CanaryFile))})
	}
	for _, r := range e.Builds(t, list) {
		e.CheckNode(t, r)
	}
}

func fdAllowList(t *testing.T, e *env) {
	r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("fds") + attack("fdread", e.CanaryFile)})
	e.CheckNode(t, r)
	var got []string
	for line := range strings.Lines(r.Log) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "fd" {
			got = append(got, f[1])
		}
	}
	require.Equal(t, []string{"0", "1", "2"}, got, r.Log)
}

// fdLeft has a runtime leave its root directory open.
func fdLeft(t *testing.T, e *env) bool {
	root, err := os.Open("/")
	require.NoError(t, err)
	defer root.Close()
	out := e.runRaw(t, raw{Node: true, Files: []*os.File{root}, Change: func(s *specs.Spec) { s.Linux.Seccomp = nil }}, "/bin/attack", "fdread", e.CanaryFile)
	return strings.Contains(out, e.Canary)
}

func (e *env) canaryHandle(t *testing.T) (kind, handle string) {
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, e.CanaryFile, 0)
	require.NoError(t, err)
	return fmt.Sprint(h.Type()), hex.EncodeToString(h.Bytes())
}

var nodeDevices = []string{"/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/loop-control", "/dev/port", "/dev/console", "/dev/tty0"}

func setuidOnDisk(t *testing.T, e *env) {
	name := random(t)
	e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN cp /bin/attack /" + name + " && chmod 4755 /" + name + "\n", NoExport: true})
	found := 0
	require.NoError(t, filepath.WalkDir(e.Root, func(path string, _ os.DirEntry, err error) error {
		if err == nil && filepath.Base(path) == name {
			found++
			require.NotContains(t, runAsNobody(path, "read", e.CanaryFile), e.Canary)
		}
		return nil
	}))
	require.NotZero(t, found, "its layer is in the store")
}

// runAsNobody runs a program as a user that owns nothing and returns what it wrote.
func runAsNobody(program string, args ...string) string {
	cmd := exec.Command(program, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, _ := cmd.CombinedOutput()
	return string(out)
}
