package escape

import (
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

var _ = register(
	entry{
		ID: "escape/other-processes", Threat: "A step finds processes of the node and of other steps in /proc, with their environments and roots.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			by, n := e.Bystander(t), e.Neighbour(t)
			for _, canary := range []string{by.Canary, n.Canary, e.Canary} {
				r := e.MustBuild(t, build{Dockerfile: "FROM tools\nARG CANARY\n" + attack("scan", canary, e.CanaryFile), NoExport: true})
				require.NotContains(t, r.Log, "found")
				require.Contains(t, r.Log, "scanned 0", "it is alone")
			}
		},
		Without: "process and user namespaces of its own",
		Off: func(t *testing.T, e *env) bool {
			by := e.Bystander(t)
			out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) {
				privileged(s)
				without(s, specs.PIDNamespace)
			}}, "/bin/attack", "scan", by.Canary, e.CanaryFile)
			return strings.Contains(out, "found in environ")
		},
	},
	entry{
		ID: "escape/roots-of-processes", Threat: "A step reaches the node's files by /proc/PID/root of a process of the node.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			by := e.Bystander(t)
			var list []string
			for _, pid := range []string{"1", "2", "self", "thread-self", fmt.Sprint(by.PID)} {
				list = append(list, "/proc/"+pid+"/root"+e.CanaryFile, "/proc/"+pid+"/cwd"+e.CanaryFile, "/proc/"+pid+"/root/.."+e.CanaryFile)
			}
			e.CheckNode(t, e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack(append([]string{"read"}, list...)...), NoExport: true}))
		},
		Without: "process and user namespaces of its own",
		Off: func(t *testing.T, e *env) bool {
			by := e.Bystander(t)
			out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) {
				privileged(s)
				without(s, specs.PIDNamespace)
			}}, "/bin/attack", "read", fmt.Sprintf("/proc/%d/root%s", by.PID, e.CanaryFile))
			return strings.Contains(out, e.Canary)
		},
	},
	entry{
		ID: "escape/signals", Threat: "A step sends signals to processes of the node and of other steps, and traces them.",
		Severity: takesNodeDown,
		Test: func(t *testing.T, e *env) {
			by, n := e.Bystander(t), e.Neighbour(t)
			r := e.Build(t, build{Dockerfile: "FROM tools\nRUN /bin/attack kill; /bin/attack kill " + fmt.Sprint(by.PID) + "\n", NoExport: true})
			require.NotContains(t, r.Log, fmt.Sprint("traced ", by.PID))
			require.NotContains(t, r.Log, fmt.Sprint("killed ", by.PID))
			require.NotContains(t, by.Log()+n.Log(), "got signal 10")
		},
		Without: "process and user namespaces of its own",
		Off: func(t *testing.T, e *env) bool {
			by := e.Bystander(t)
			out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) {
				privileged(s)
				without(s, specs.PIDNamespace)
			}}, "/bin/attack", "kill", fmt.Sprint(by.PID))
			return strings.Contains(out, fmt.Sprint("killed ", by.PID)) && strings.Contains(out, fmt.Sprint("traced ", by.PID))
		},
	},
	entry{
		ID: "escape/ipc", Threat: "A step uses System V memory, message queues and abstract sockets of the node and of other steps.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			by, n := e.Bystander(t), e.Neighbour(t)
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("ipc"), NoExport: true})
			r.CheckSecret(t, by.Canary)
			r.CheckSecret(t, n.Canary)
			require.Contains(t, r.Log, "abstract: ")
		},
		Without: "IPC and network namespaces of its own",
		Off: func(t *testing.T, e *env) bool {
			by := e.Bystander(t)
			out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) {
				without(s, specs.IPCNamespace)
				without(s, specs.NetworkNamespace)
			}}, "/bin/attack", "ipc")
			return strings.Contains(out, "shm: "+by.Canary) && strings.Contains(out, "abstract: ") && strings.Count(out, by.Canary) > 1
		},
	},
	entry{
		ID: "escape/ids", Threat: "A step's IDs are those of the node, or of another step at the same time, so that what gets out owns files and processes.",
		Severity: escapesToNode,
		Not:      map[sandbox.Class]string{sandbox.GVisor: "no process on the node has a step's IDs"},
		Test: func(t *testing.T, e *env) {
			e.Neighbour(t)
			log := e.MustBuild(t, build{Tenant: victim, Dockerfile: "FROM tools\nRUN cat /proc/self/uid_map /proc/self/gid_map\n", NoExport: true}).Log +
				e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN cat /proc/self/uid_map /proc/self/gid_map\n", NoExport: true}).Log
			maps := 0
			for line := range strings.Lines(log) {
				f := strings.Fields(line)
				require.Len(t, f, 3, log)
				require.Equal(t, "0", f[0])
				require.GreaterOrEqual(t, len(f[1]), 6, "an ID of the node: %s", line)
				require.Equal(t, "65536", f[2])
				maps++
			}
			require.Equal(t, 4, maps)
		},
		Without: "the user namespace",
		Off: func(t *testing.T, e *env) bool {
			return strings.Contains(e.runRaw(t, raw{Node: true}, "/bin/cat", "/proc/self/uid_map"), "0          0 4294967295")
		},
	},
)

// without takes a namespace out of a specification.
func without(s *specs.Spec, kind specs.LinuxNamespaceType) {
	var kept []specs.LinuxNamespace
	for _, n := range s.Linux.Namespaces {
		if n.Type != kind {
			kept = append(kept, n)
		}
	}
	s.Linux.Namespaces = kept
}
