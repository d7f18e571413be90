package sandbox

import (
	"fmt"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// stepCapabilities are the capabilities of a step, all of them over the step's
// own user namespace or sentry only. They are what package managers and su need;
// no network administration, no mknod, no ptrace of others.
var stepCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
	"CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// maskedPaths and readonlyPaths hide what /proc and /sys tell of the node.
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
		"/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// BaseSpec returns the OCI runtime spec of a step that runs p: everything but the
// root path, the step's own mounts, the user namespace and the cgroup, which
// belong to the runtime. netns is the path of the step's network namespace.
func BaseSpec(step *Step, p Process, ids UserIDs, netns string, noNewPrivs bool) *specs.Spec {
	hostname := step.Hostname
	if hostname == "" {
		hostname = DefaultHostname
	}
	shm := step.Limits.ShmBytes
	if shm == 0 {
		shm = DefaultShmBytes
	}
	s := &specs.Spec{
		Version:  "1.2.0",
		Hostname: hostname,
		Process:  ProcessSpec(step.Limits.Hold(p), ids, noNewPrivs),
		Root:     &specs.Root{Readonly: step.ReadonlyRoot},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", shm)}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			MaskedPaths:   maskedPaths,
			ReadonlyPaths: readonlyPaths,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace, Path: netns},
			},
		},
	}
	s.Linux.Seccomp = seccomp.DefaultProfile(s)
	return s
}

// ProcessSpec returns the process part of an OCI runtime spec. Limits.Hold has passed p.
func ProcessSpec(p Process, ids UserIDs, noNewPrivs bool) *specs.Process {
	sp := &specs.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd, Terminal: p.Terminal,
		User:            specs.User{UID: ids.UID, GID: ids.GID, AdditionalGids: ids.Groups},
		NoNewPrivileges: noNewPrivs,
		Capabilities: &specs.LinuxCapabilities{
			Bounding:  stepCapabilities,
			Effective: stepCapabilities,
			Permitted: stepCapabilities,
		},
	}
	for _, r := range p.Rlimits {
		sp.Rlimits = append(sp.Rlimits, specs.POSIXRlimit{Type: r.Type, Soft: r.Soft, Hard: r.Hard})
	}
	if ids.UID != 0 {
		// Capabilities would otherwise survive the change of user at start.
		sp.Capabilities.Effective, sp.Capabilities.Permitted = nil, nil
	}
	return sp
}
