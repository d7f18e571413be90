package userns

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/stepfs"
)

// inRunc runs a step of a busybox with runc, by the spec that our sandboxes are made
// of, and calls up with the ID of its process when it has started.
func inRunc(t *testing.T, step *sandbox.Step, noNewPrivs, foreign bool, up func(pid int)) string {
	t.Helper()
	const first = FirstID + 1000*RangeSize
	ns, err := newUserNS(first)
	require.NoError(t, err)
	defer ns.Close()
	dir := openDir(t)
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o711)) // runc has to get to it by its path
	rootfs := filepath.Join(dir, "rootfs")
	unmount, err := stepfs.Make(step.Root, rootfs, stepfs.Options{Suid: true, Volatile: true, IDMap: &stepfs.IDMap{UserNS: int(ns.Fd()), UID: first, GID: first}})
	require.NoError(t, err)
	defer func() { require.NoError(t, unmount()) }()
	ids, err := sandbox.ResolveUser(rootfs, step.Process.User)
	require.NoError(t, err)
	spec := sandbox.BaseSpec(step, step.Process, ids, "", noNewPrivs)
	clamp(spec.Process)
	if !foreign {
		spec.Linux.Seccomp.Architectures = nil
	}
	spec.Root.Path = rootfs
	mapping := []specs.LinuxIDMapping{{HostID: first, Size: RangeSize}}
	spec.Linux.UIDMappings, spec.Linux.GIDMappings = mapping, mapping
	spec.Linux.Namespaces = append(spec.Linux.Namespaces,
		specs.LinuxNamespace{Type: specs.UserNamespace}, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	spec.Linux.CgroupsPath = "/" + step.ID
	files, err := sandbox.WriteEtcFiles(dir, step, nil)
	require.NoError(t, err)
	for destination, file := range files {
		require.NoError(t, os.Chown(file, first, first))
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: destination, Type: "bind", Source: file, Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}})
	}
	data, err := json.Marshal(spec)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600))
	state := filepath.Join(dir, "state")
	cmd := exec.Command(runcPath(), "--root", state, "run", "--bundle", dir, "--pid-file", filepath.Join(dir, "pid"), step.ID)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	if up != nil {
		require.Eventually(t, func() bool {
			_, err := os.Stat(filepath.Join(state, step.ID, "exec.fifo"))
			pid, perr := os.ReadFile(filepath.Join(dir, "pid"))
			return os.IsNotExist(err) && perr == nil && len(pid) > 0
		}, 10*time.Second, 5*time.Millisecond)
		data, err := os.ReadFile(filepath.Join(dir, "pid"))
		require.NoError(t, err)
		pid, err := strconv.Atoi(string(data))
		require.NoError(t, err)
		up(pid)
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	}
	err = cmd.Wait()
	if up == nil {
		require.NoError(t, err, out.String())
	}
	return out.String()
}

// look tells what a process sees and is. What differs by its nature is left out by
// alike.
const look = `exec 2>&1
echo == status; grep -vE '^(Pid|Tgid|NSpid|NStgid|NSpgid|NSsid|PPid|FDSize|Vm|Rss|Hugetlb|voluntary|nonvoluntary|Cpus|Mems|Seccomp_filters|Threads|SigQ|Speculation)' /proc/self/status
echo == limits; cat /proc/self/limits
echo == mounts; cat /proc/self/mountinfo
echo == env; env
echo == dev; ls -lan /dev /dev/shm /dev/mqueue
echo == id; id; umask; pwd; hostname
echo == cgroup; cut -d: -f3 /proc/self/cgroup | sort -u
echo == ids; cat /proc/self/uid_map /proc/self/setgroups /proc/self/oom_score_adj
echo == masked; for f in /proc/kcore /proc/keys /proc/timer_list /proc/interrupts /sys/firmware /proc/acpi /proc/scsi; do echo $f; ls -ln $f; cat $f | wc -c; done
echo == written; for f in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/irq/x /sys/x /x /dev/x /dev/shm/x /etc/hosts; do echo $f; echo x > $f; done; rm -f /x /dev/x
echo == links; readlink /proc/self/fd/0 /dev/fd /dev/stdin /dev/stdout /dev/ptmx /dev/core
echo == processes; ls /proc | grep -E '^[0-9]+$' | head -1; cat /proc/1/comm
echo == session; cut -d' ' -f5-8 /proc/1/stat
echo == network; cat /proc/net/dev | cut -d: -f1; ip addr 2>&1 | grep -E 'lo|inet'
`

func TestStepSeesWhatRuncGives(t *testing.T) {
	r := newRuntime(t)
	for _, user := range []string{"", "www"} {
		step := func() *sandbox.Step {
			s := newStep(t, look)
			s.Process.User, s.Process.Cwd = user, "/tmp/new"
			s.Process.Env = []string{"A=1", "PATH=/bin", "A=2"}
			return s
		}
		want := inRunc(t, step(), true, false, nil)
		got, code := run(t, r, step())
		require.Zero(t, code, got)
		require.Equal(t, alike(want), alike(got), "user %q", user)
	}
}

// alike leaves out of the output of look what no two steps have in common.
func alike(out string) string {
	var lines, mounts []string
	section := ""
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(line, "== "); ok {
			section = strings.TrimSpace(name)
		} else if section == "mounts" {
			mounts = append(mounts, sameMount(line))
			continue
		}
		for _, r := range []struct{ from, to string }{
			{`20\d\d-\d\d-\d\d`, "DAY"}, {`[A-Z][a-z]{2} +\d+ +\d\d:\d\d`, "TIME"}, {`pipe:\[\d+\]`, "pipe"},
			{`(drwxrwxrwt +2 0 +)65534( +40 )`, "${1}0    $2"}, // runc's group of the IPC namespace
			{`^(\s*0\s+)\d+(\s+65536)`, "$1 FIRST $2"}, {`\b(0x)?[0-9]{10}\b`, "ID"},
		} {
			line = regexp.MustCompile(r.from).ReplaceAllString(line, r.to)
		}
		lines = append(lines, line)
	}
	slices.Sort(mounts)
	return strings.Join(append(lines, mounts...), "")
}

// sameMount leaves out of a line of mountinfo what differs by its nature.
func sameMount(line string) string {
	f := strings.Fields(line)
	dash := slices.Index(f, "-")
	options := strings.Split(f[dash+3], ",")
	options = slices.DeleteFunc(options, func(o string) bool {
		return regexp.MustCompile(`^(uid|gid)=2\d+|lowerdir|upperdir|workdir|nr_|size=\d+k$|inode64`).MatchString(o) && !strings.Contains(o, "size=65536k")
	})
	root := f[3]
	if f[dash+1] == "tmpfs" || f[dash+1] == "ext4" {
		root = filepath.Base(root)
	}
	if strings.HasPrefix(f[4], "/etc/") {
		return fmt.Sprintln(root, f[4], f[5], strings.Join(f[6:dash], " "))
	}
	return fmt.Sprintln(root, f[4], f[5], strings.Join(f[6:dash], " "), f[dash+1], options)
}

// newCalls have low numbers, but are newer than libraries of some distributions.
var newCalls = []string{"uretprobe"}

// only64 are calls of x86-64 that x32 does not have; the table says otherwise.
var only64 = []string{"set_thread_area", "get_thread_area", "epoll_ctl_old", "epoll_wait_old", "_sysctl", "create_module", "get_kernel_syms", "query_module", "uselib", "nfsservctl", "vserver"}

func TestSystemCallFilterIsThatOfRunc(t *testing.T) {
	r := newRuntime(t)
	for _, foreign := range []bool{false, true} {
		ours, err := r.filters.of(foreign)
		require.NoError(t, err)
		var theirs []bpf.RawInstruction
		inRunc(t, newStep(t, "sleep 1000"), true, foreign, func(pid int) { theirs = filterOf(t, pid) })
		vms := [2]*bpf.VM{}
		for i, raw := range [][]bpf.RawInstruction{ours, theirs} {
			insns, ok := bpf.Disassemble(raw)
			require.True(t, ok)
			vms[i], err = bpf.NewVM(insns)
			require.NoError(t, err)
		}
		decide := func(vm *bpf.VM, a arch.AuditArch, nr uint32, args [6]uint64) uint32 {
			b := make([]byte, 64)
			binary.BigEndian.PutUint32(b, nr)
			binary.BigEndian.PutUint32(b[4:], uint32(a))
			for i, v := range args {
				binary.BigEndian.PutUint32(b[16+8*i:], uint32(v))
				binary.BigEndian.PutUint32(b[20+8*i:], uint32(v>>32))
			}
			got, err := vm.Run(b)
			require.NoError(t, err)
			return uint32(got)
		}
		const x32Bit = 0x40000000
		const enosys = 0x50000 | uint32(unix.ENOSYS)
		compared := 0
		for _, m := range []*arch.Info{arch.X86_64, arch.I386, arch.X32, arch.AARCH64} {
			for nr := range uint32(600) {
				nr |= uint32(m.SeccompMask)
				for _, v := range []uint64{0, 1, 8, 16, 17, 38, 40, 0x20000, 0x20008, 0xffffffff, 0x1_0000_0000, unix.CLONE_NEWUSER, unix.CLONE_NEWNS, unix.CLONE_VM | unix.CLONE_VFORK} {
					if (m == arch.I386 || m == arch.X32) && v>>32 != 0 {
						continue // their arguments have 32 bits
					}
					args := [6]uint64{v, v, v, v, v, v}
					got, want := decide(vms[0], m.ID, nr, args), decide(vms[1], m.ID, nr, args)
					name, known := m.SyscallNumbers[int(nr&^uint32(m.SeccompMask))]
					if want == enosys && got != want || slices.Contains(newCalls, name) ||
						m == arch.X32 && (slices.Contains(only64, name) || nr^x32Bit > 448 && nr^x32Bit < 512) {
						// The library of runc may know fewer calls than we do.
						require.True(t, known || got == want, "%s %#x", m.Name, nr)
						continue
					}
					require.Equal(t, want, got, "foreign %v: %s %#x (%s) of %#x", foreign, m.Name, nr, m.SyscallNumbers[int(nr&^uint32(m.SeccompMask))], v)
					compared++
				}
			}
		}
		require.Greater(t, compared, 10000)
	}
}

// filterOf returns the system call filter of a process.
func filterOf(t *testing.T, pid int) []bpf.RawInstruction {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	require.NoError(t, unix.PtraceAttach(pid))
	defer func() { require.NoError(t, unix.PtraceDetach(pid)) }()
	_, err := unix.Wait4(pid, nil, unix.WALL, nil)
	require.NoError(t, err)
	const getFilter = 0x420c // PTRACE_SECCOMP_GET_FILTER
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, getFilter, uintptr(pid), 0, 0, 0, 0)
	require.Zero(t, errno)
	raw := make([]struct {
		Op     uint16
		Jt, Jf uint8
		K      uint32
	}, n)
	_, _, errno = unix.Syscall6(unix.SYS_PTRACE, getFilter, uintptr(pid), 0, uintptr(unsafe.Pointer(&raw[0])), 0, 0)
	require.Zero(t, errno)
	out := make([]bpf.RawInstruction, n)
	for i, r := range raw {
		out[i] = bpf.RawInstruction{Op: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return out
}
