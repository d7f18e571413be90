package escape

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/sandbox"
)

// rawFirstID is the first ID of the user namespace of raw containers.
const rawFirstID = 300000

// raw is a container of runc's, which attacks run in without a control. It begins as
// a step of the class userns: with its specification and IDs of its own.
type raw struct {
	// Node leaves the user namespace out: root is that of the node.
	Node bool
	// Netns is the path of a network namespace; empty: one without a way out.
	Netns string
	// Change takes a control away.
	Change func(*specs.Spec)
	// Root is changed before the container is made from it.
	Root func(dir string)
	// Files are given to the process as descriptors from 3 on.
	Files []*os.File
}

// runRaw runs an attack in a container, and returns what it wrote.
func (e *env) runRaw(t *testing.T, r raw, args ...string) string {
	t.Helper()
	bundle, err := os.MkdirTemp("/tmp", "kiln-escape-raw-") // other IDs have to get to it
	require.NoError(t, err)
	defer func() { require.NoError(t, os.RemoveAll(bundle)) }()
	root := filepath.Join(bundle, "rootfs")
	copyTools := exec.Command("cp", "-a", e.tools, root)
	require.NoError(t, copyTools.Run())
	if r.Root != nil {
		r.Root(root)
	}
	s := sandbox.BaseSpec(&sandbox.Step{}, sandbox.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}}, sandbox.UserIDs{}, r.Netns, false)
	s.Root.Path = root
	s.Process.Rlimits = nil // the test may not be allowed to raise them
	if !r.Node {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: rawFirstID, Size: 65536}}
		s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
		require.NoError(t, exec.Command("chown", "-hR", "300000:300000", root).Run())
		require.NoError(t, os.Chmod(bundle, 0o755))
	}
	if r.Change != nil {
		r.Change(s)
	}
	config, err := json.Marshal(s)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(bundle, "config.json"), config, 0o600))
	runc := agenttest.RepoBin(t, "runc")
	id := "kiln-" + random(t)
	args = []string{"--root", filepath.Join(bundle, "state"), "run", "--bundle", bundle}
	if len(r.Files) > 0 {
		args = append(args, "--preserve-fds", string(rune('0'+len(r.Files))))
	}
	cmd := exec.Command(runc, append(args, id)...)
	cmd.ExtraFiles = r.Files
	out, err := cmd.CombinedOutput()
	t.Logf("runc: %v: %.3000s", err, out)
	return string(out)
}

// privileged takes everything away that keeps a container from the node; it may do what
// this process may.
func privileged(s *specs.Spec) {
	s.Linux.Seccomp, s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil, nil
	all, err := cap.Current()
	if err != nil {
		panic(err)
	}
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: all}
	s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "a", Access: "rwm"}}}
}
