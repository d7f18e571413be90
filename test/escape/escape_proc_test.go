package escape

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

var _ = register(
	entry{
		ID: "escape/core-pattern", Threat: "A step writes core_pattern, and has the kernel run a program of its own as root of the node.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			sysctlsHold(t, e, map[string]string{"kernel/core_pattern": "|/kiln-escape", "kernel/core_pipe_limit": "7"})
		},
		Without: "the user namespace and read-only places of /proc", Off: func(t *testing.T, e *env) bool { return writesWithout(t, e, "/proc/sys/kernel/core_pattern") },
	},
	entry{
		ID: "escape/sysctls", Threat: "A step changes parameters of the node's kernel.",
		Severity: takesNodeDown,
		Test: func(t *testing.T, e *env) {
			sysctlsHold(t, e, map[string]string{"kernel/panic": "7", "vm/swappiness": "7", "vm/overcommit_memory": "2", "kernel/modprobe": "/kiln-escape", "kernel/hotplug": "/kiln-escape", "fs/file-max": "7"})
		},
		Without: "the user namespace and read-only places of /proc", Off: func(t *testing.T, e *env) bool { return writesWithout(t, e, "/proc/sys/vm/swappiness") },
	},
	entry{
		ID: "escape/kernel-files", Threat: "A step finds a file of /proc or /sys that it may write, such as sysrq-trigger, uevent_helper or a parameter of a driver.",
		Severity: escapesToNode,
		Not:      map[sandbox.Class]string{sandbox.GVisor: "its /proc and /sys are of its own kernel"},
		Test: func(t *testing.T, e *env) {
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("openall", "/proc/sys", "/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/driver") + attack("write", "/proc/sysrq-trigger", "h"), NoExport: true})
			require.Contains(t, r.Log, "opened 0 files for writing", r.Log)
			require.NotContains(t, r.Log, "wrote")
		},
		Without: "the user namespace and read-only places of /proc and /sys",
		Off: func(t *testing.T, e *env) bool {
			out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) {
				privileged(s)
				for i, m := range s.Mounts {
					if m.Destination == "/sys" {
						s.Mounts[i].Options = []string{"nosuid", "noexec", "nodev"}
					}
				}
			}}, "/bin/attack", "openall", "/proc/sys", "/sys")
			return strings.Contains(out, "for writing") && !strings.Contains(out, "opened 0 files")
		},
	},
	entry{
		ID: "escape/kernel-memory", Threat: "A step reads the kernel's memory and tables in /proc, which tell addresses and what others do.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack(append([]string{"read"}, maskedFiles...)...), NoExport: true})
			require.NotRegexp(t, `: [1-9][0-9]* bytes`, r.Log)
		},
		Without: "masked places of /proc, in a privileged container",
		Off: func(t *testing.T, e *env) bool {
			out := e.runRaw(t, raw{Node: true, Change: privileged}, append([]string{"/bin/attack", "read"}, maskedFiles...)...)
			return strings.Contains(out, "bytes")
		},
	},
	entry{
		ID: "escape/release-agent", Threat: "A step mounts a cgroup hierarchy, and has the kernel run a program of its own when a group empties.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			agent, marker := releaseAgent(t, e)
			e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN " + useReleaseAgent(agent) + "; true\n", NoExport: true})
			require.NoFileExists(t, marker)
		},
		Without: "the sandbox, in a privileged container",
		Off: func(t *testing.T, e *env) bool {
			agent, marker := releaseAgent(t, e)
			e.runRaw(t, raw{Node: true, Change: privileged}, "/bin/sh", "-c", useReleaseAgent(agent))
			// The kernel starts it a moment later.
			for range 100 {
				if _, err := os.Stat(marker); err == nil {
					return true
				}
				_ = exec.Command("sleep", "0.02").Run()
			}
			return false
		},
	},
	entry{
		ID: "escape/cgroups", Threat: "A step raises its own limits, or leaves its cgroup.",
		Severity: takesNodeDown,
		Test: func(t *testing.T, e *env) {
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\n" + attack("cgroup", "/sys/fs/cgroup"), NoExport: true})
			require.Contains(t, r.Log, "walked")
			if e.Class == sandbox.Userns {
				require.NotRegexp(t, "wrote|made a group", r.Log)
			}
		},
		Without: "the user namespace, and with cgroups mounted",
		Off: func(t *testing.T, e *env) bool {
			out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "nodev", "noexec"}})
			}}, "/bin/attack", "cgroup", "/sys/fs/cgroup")
			return strings.Contains(out, "wrote") || strings.Contains(out, "made a group")
		},
	},
	entry{
		ID: "escape/entrypoint-proc-self-exe", Threat: "A step's program is a script of /proc/self/exe, and another process of the step overwrites the runtime's program when it runs as that.",
		Severity: escapesToNode, Test: overwriteRuntime,
		Without: "a runtime that enters with nothing of the node's, by nsenter", Off: overwriteRuntimeOff,
	},
)

var maskedFiles = []string{
	"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/interrupts", "/proc/latency_stats", "/proc/timer_stats",
	"/proc/scsi/scsi", "/proc/acpi/wakeup", "/sys/firmware/acpi/tables/DSDT", "/sys/firmware/dmi/tables/DMI", "/proc/kpagecount", "/proc/vmallocinfo", "/proc/slabinfo",
}

// sysctlsHold has a step write values, and looks at those of the node.
func sysctlsHold(t *testing.T, e *env, values map[string]string) {
	before := map[string]string{}
	file := "FROM tools\n"
	for name, value := range values {
		data, _ := os.ReadFile("/proc/sys/" + name) // not every kernel has each
		before[name] = string(data)
		require.NotEqual(t, value, strings.TrimSpace(string(data)), name)
		file += attack("write", "/proc/sys/"+name, value)
	}
	r := e.MustBuild(t, build{Dockerfile: file, NoExport: true})
	for name, was := range before {
		data, _ := os.ReadFile("/proc/sys/" + name)
		if string(data) != was {
			_ = os.WriteFile("/proc/sys/"+name, []byte(was), 0)
		}
		require.Equal(t, was, string(data), name)
	}
	if e.Class == sandbox.Userns {
		require.NotContains(t, r.Log, "wrote")
	}
}

// writesWithout writes what is there already.
func writesWithout(t *testing.T, e *env, file string) bool {
	out := e.runRaw(t, raw{Node: true, Change: func(s *specs.Spec) { s.Linux.ReadonlyPaths = nil }}, "/bin/attack", "write", file)
	return strings.Contains(out, "wrote "+file)
}

// releaseAgent makes a program of the attacker on the node, which leaves a marker.
func releaseAgent(t *testing.T, e *env) (program, marker string) {
	t.Helper()
	dir := e.dir(t)
	program, marker = filepath.Join(dir, "agent"), filepath.Join(dir, "marker")
	require.NoError(t, os.WriteFile(program, []byte("#!/bin/sh\n: > "+marker+"\n"), 0o755))
	return program, marker
}

func useReleaseAgent(program string) string {
	return fmt.Sprintf("mkdir /cg && mount -t cgroup -o none,name=kilnescape cgroup /cg && mkdir /cg/x && echo 1 > /cg/x/notify_on_release && "+
		"echo %s > /cg/release_agent && sh -c 'echo $$ > /cg/x/cgroup.procs'; sleep 0.2; rmdir /cg/x; umount /cg; ls -la /cg", program)
}

// overwriteRuntime has a step look for programs of the runtime while many others
// are started in it, and in steps beside it.
func overwriteRuntime(t *testing.T, e *env) {
	before := map[string]string{}
	for _, p := range []string{"/proc/self/exe", filepath.Join(e.bin(t), "runsc")} {
		before[p] = sum(t, p)
	}
	look := "/bin/attack exewrite 10000 /bin/attack /bin/busybox"
	log, err := e.inContainer(t, look, []string{"/bin/true"}, 12)
	require.NoError(t, err, log)
	require.Contains(t, log, "looked")
	require.NotContains(t, log, "writable program", log)
	for _, p := range []string{"/script", "/proc/self/exe"} {
		log, _ = e.inContainer(t, look, []string{p}, 1)
		require.NotContains(t, log, "writable program", log)
	}
	// As the first process of a step, too.
	e.Build(t, build{Dockerfile: "FROM tools\nCOPY script /script\nRUN [\"/script\"]\n", Files: map[string]string{"script": "#!/proc/self/exe\n"}, NoExport: true})
	for p, s := range before {
		require.Equal(t, s, sum(t, p), p)
	}
}

// overwriteRuntimeOff enters a process namespace as a program of the node does that
// takes no care.
func overwriteRuntimeOff(t *testing.T, e *env) bool {
	dir := e.dir(t)
	program := filepath.Join(dir, "runtime")
	require.NoError(t, exec.Command("cp", filepath.Join(e.tools, "bin/busybox"), program).Run())
	attacker := exec.Command("unshare", "--pid", "--fork", "--mount-proc", filepath.Join(e.tools, "bin/attack"), "exewrite", "30000", filepath.Join(e.tools, "bin/attack"))
	out, err := os.Create(filepath.Join(dir, "out"))
	require.NoError(t, err)
	defer out.Close()
	attacker.Stdout = out
	require.NoError(t, startBound(attacker))
	for range 200 {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", attacker.Process.Pid, attacker.Process.Pid))
		if pid := strings.TrimSpace(string(children)); pid != "" {
			_ = exec.Command("nsenter", "--target", pid, "--pid", program, "sleep", "0.05").Run()
		}
		data, err := os.ReadFile(out.Name())
		require.NoError(t, err)
		if strings.Contains(string(data), "writable program") {
			_ = exec.Command("kill", "-KILL", strings.TrimSpace(string(children))).Run()
			_ = attacker.Wait()
			return true
		}
	}
	_ = attacker.Wait()
	return false
}
