package escape

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// controls are what keeps a step from system calls; each is taken away with those
// before it.
var controls = map[string]raw{
	"the filter of system calls":                               {Change: func(s *specs.Spec) { s.Linux.Seccomp = nil }},
	"the filter of system calls and the limit of capabilities": {Change: powerful},
	"the sandbox, in a privileged container":                   {Node: true, Change: privileged},
}

const (
	filter  = "the filter of system calls"
	powers  = "the filter of system calls and the limit of capabilities"
	allOfIt = "the sandbox, in a privileged container"
)

// powerful gives a step all capabilities over its own user namespace.
func powerful(s *specs.Spec) {
	readonly, masked := s.Linux.ReadonlyPaths, s.Linux.MaskedPaths
	privileged(s)
	s.Linux.ReadonlyPaths, s.Linux.MaskedPaths, s.Linux.Resources = readonly, masked, nil
}

// calls are system calls that attacks begin with, by the names that attack sys gives
// them. without is the control that they succeed without; none, when this kind of
// kernel has no such thing at all.
func calls(id, threat string, s severity, without string, names ...string) bool {
	en := entry{ID: id, Threat: threat, Severity: s, Test: func(t *testing.T, e *env) { callsAreRefused(t, e, names) }}
	if without != "" {
		en.Without = without
		en.Off = func(t *testing.T, e *env) bool {
			got := memo(e.world, "sys/"+without, func() map[string]string { return sysResults(e.runRaw(t, controls[without], "/bin/attack", "sys")) })
			for _, n := range names {
				if got[n] == "" || refused(got[n]) {
					t.Logf("%s: %s", n, got[n])
					return false
				}
			}
			return true
		}
	}
	return register(en)
}

var _ = calls("escape/new-user-namespace", "A step makes a user namespace, in which it has every capability that holes in the kernel ask for.", escapesToNode,
	filter, "unshare-user", "clone-user", "clone3-user")
var _ = calls("escape/new-namespaces", "A step makes mount, network, process and cgroup namespaces.", escapesToNode,
	powers, "unshare-mount", "unshare-net", "unshare-pid", "unshare-cgroup")
var _ = calls("escape/mounts", "A step mounts file systems of the kernel, or trees again without their restrictions.", escapesToNode,
	powers, "mount-tmpfs", "mount-proc", "mount-bind", "mount-binfmt", "fsopen", "open-tree", "pivot-root")
var _ = calls("escape/remount-proc", "A step makes the read-only places of /proc writable, or takes away what hides them.", escapesToNode,
	powers, "remount", "umount")
var _ = calls("escape/mount-kernel", "A step mounts sysfs, cgroups and BPF's file system.", escapesToNode,
	allOfIt, "mount-sysfs", "mount-cgroup", "mount-bpf")
var _ = calls("escape/setns", "A step enters a mount namespace by way of /proc.", escapesToNode, powers, "setns")
var _ = calls("escape/nf-tables", "A step makes packet filters, a way to many holes in the kernel.", escapesToNode, powers, "nf-tables")
var _ = calls("escape/io-uring", "A step makes io_uring queues, which pass by the filter of system calls.", escapesToNode, filter, "io-uring")
var _ = calls("escape/bpf", "A step loads BPF maps and programs into the kernel.", escapesToNode, allOfIt, "bpf")
var _ = calls("escape/keyrings", "A step uses the kernel's keyrings, which namespaces do not separate.", readsNode, filter, "add-key", "keyctl")
var _ = calls("escape/perf-event", "A step measures the kernel and its neighbours with performance events.", readsNode, allOfIt, "perf-event")
var _ = calls("escape/userfaultfd", "A step holds the kernel in the middle of a copy with userfaultfd.", escapesToNode, allOfIt, "userfaultfd")
var _ = calls("escape/fanotify", "A step watches, and holds up, who opens files.", takesNodeDown, allOfIt, "fanotify")
var _ = calls("escape/mknod", "A step makes device nodes of the node's memory and disks.", escapesToNode, allOfIt, "mknod-mem", "mknod-disk", "mknod-dev")
var _ = calls("escape/kexec-and-modules", "A step loads another kernel, or modules into this one.", escapesToNode, "", "kexec", "init-module", "delete-module")
var _ = calls("escape/reboot", "A step reboots the node.", takesNodeDown, allOfIt, "reboot")
var _ = calls("escape/swap-and-accounting", "A step makes the kernel write to a file of its choice, as swap or account of processes.", escapesToNode, allOfIt, "swapon", "acct")
var _ = calls("escape/clock", "A step changes the node's clock.", takesNodeDown, allOfIt, "adjtimex")
var _ = calls("escape/io-ports", "A step gets the ports of the node's devices.", escapesToNode, "", "iopl")
var _ = calls("escape/kernel-log", "A step reads the kernel's log, which has addresses and what neighbours do.", readsNode, allOfIt, "syslog")
var _ = calls("escape/raw-sockets", "A step makes raw and packet sockets, to forge what its neighbours get.", reachesTenant, powers, "af-packet", "raw-socket")
var _ = calls("escape/vsock", "A step talks to the hypervisor of the node, or of its neighbours, by vsock.", escapesToNode, filter, "af-vsock")
var _ = calls("escape/network-devices", "A step changes its network devices, to take other addresses.", reachesTenant, powers, "link-flags")
var _ = calls("escape/realtime", "A step takes the node's processors with a real-time priority.", takesNodeDown, "", "realtime")

// fromSentry are calls that gVisor answers from what it has itself.
var fromSentry = []string{"unshare-user", "clone-user", "clone3-user", "syslog", "oom-score"}

func callsAreRefused(t *testing.T, e *env, names []string) {
	got := memo(e.world, "sys/"+string(e.Class), func() map[string]string {
		return sysResults(e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN [\"/bin/attack\", \"sys\"]\n", NoExport: true}).Log)
	})
	if e.Class == sandbox.GVisor {
		require.Contains(t, got["kernel"], "gvisor", "the calls do not reach the node's kernel")
	}
	for _, n := range names {
		require.NotEmpty(t, got[n], n)
		if e.Class == sandbox.GVisor && (slices.Contains(fromSentry, n) || slices.Contains(strange, got[n])) {
			continue
		}
		require.True(t, refused(got[n]), "%s: %s", n, got[n])
	}
}

// strange are answers of gVisor to what it does not have: that a flag, a device or a
// kind of control is unknown.
var strange = []string{"22", "19", "25"}

// refused tells whether a result of attack sys is that of a call that one may not
// make, or that there is not.
func refused(result string) bool {
	for _, e := range []unix.Errno{unix.EPERM, unix.EACCES, unix.ENOSYS, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT} {
		if result == strconv.Itoa(int(e)) {
			return true
		}
	}
	return false
}

func sysResults(log string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(log) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "sys" {
			out[f[1]] = f[2]
		}
	}
	return out
}
