package filter

import (
	"encoding/binary"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// call is what a filter sees.
type call struct {
	arch arch.AuditArch
	nr   uint32
	args [6]uint64
}

func (c call) data() []byte {
	// The virtual machine reads big-endian words where the kernel reads its own.
	b := make([]byte, 64)
	binary.BigEndian.PutUint32(b[0:], c.nr)
	binary.BigEndian.PutUint32(b[4:], uint32(c.arch))
	for i, a := range c.args {
		binary.BigEndian.PutUint32(b[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(b[20+8*i:], uint32(a>>32))
	}
	return b
}

func decisionOf(t testing.TB, raw []bpf.RawInstruction, c call) uint32 {
	t.Helper()
	insns, ok := bpf.Disassemble(raw)
	require.True(t, ok)
	vm, err := bpf.NewVM(insns)
	require.NoError(t, err)
	got, err := vm.Run(c.data())
	require.NoError(t, err)
	return uint32(got)
}

func profileOf(op specs.LinuxSeccompOperator, value, two uint64) *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 1, Op: op, Value: value, ValueTwo: two}}},
			{Names: []string{"prctl"}, Action: specs.ActAllow},
		},
	}
}

func TestComparisons(t *testing.T) {
	const big = 0x1_0000_0005
	for _, c := range []struct {
		op         specs.LinuxSeccompOperator
		value, two uint64
		yes, no    []uint64
	}{
		{specs.OpEqualTo, big, 0, []uint64{big}, []uint64{5, big + 1, 0x2_0000_0005}},
		{specs.OpNotEqual, big, 0, []uint64{5, big + 1, 0x2_0000_0005}, []uint64{big}},
		{specs.OpLessThan, big, 0, []uint64{0, big - 1, 9}, []uint64{big, big + 1, 0x2_0000_0000}},
		{specs.OpLessEqual, big, 0, []uint64{0, big, 9}, []uint64{big + 1, 0x2_0000_0000}},
		{specs.OpGreaterThan, big, 0, []uint64{big + 1, 0x2_0000_0000}, []uint64{0, big, 9}},
		{specs.OpGreaterEqual, big, 0, []uint64{big, 0x2_0000_0000}, []uint64{0, big - 1, 9}},
		{specs.OpMaskedEqual, 0xf0_0000_000f, 0x10_0000_0002, []uint64{0x10_0000_0002, 0x1f_ffff_fff2}, []uint64{0x20_0000_0002, 0x10_0000_0003}},
	} {
		raw, err := Compile(profileOf(c.op, c.value, c.two))
		require.NoError(t, err)
		for _, v := range c.yes {
			require.EqualValues(t, retAllow, decisionOf(t, raw, call{arch.X86_64.ID, 0, [6]uint64{0, v}}), "%s %#x", c.op, v)
		}
		for _, v := range c.no {
			require.EqualValues(t, retErrno|uint32(unix.EPERM), decisionOf(t, raw, call{arch.X86_64.ID, 0, [6]uint64{0, v}}), "%s %#x", c.op, v)
		}
	}
}

func TestCallsOutsideOfTheProfile(t *testing.T) {
	raw, err := Compile(profileOf(specs.OpEqualTo, 1, 0))
	require.NoError(t, err)
	for name, c := range map[string]struct {
		call call
		want uint32
	}{
		"between those it names":   {call{arch: arch.X86_64.ID, nr: 100}, retErrno | uint32(unix.EPERM)},
		"above all it names":       {call{arch: arch.X86_64.ID, nr: 158}, retErrno | uint32(unix.ENOSYS)},
		"of another machine":       {call{arch: arch.I386.ID, nr: 3}, retKill},
		"of x32":                   {call{arch: arch.X86_64.ID, nr: x32Bit}, retKill},
		"none, set by a tracer":    {call{arch: arch.X86_64.ID, nr: noCall}, retErrno | uint32(unix.EPERM)},
		"the last one that it has": {call{arch: arch.X86_64.ID, nr: 157}, retAllow},
	} {
		require.Equal(t, c.want, decisionOf(t, raw, c.call), name)
	}
}

func TestRefusedProfiles(t *testing.T) {
	p := profileOf("SCMP_CMP_XX", 0, 0)
	_, err := Compile(p)
	require.ErrorContains(t, err, "comparison")
	p = profileOf(specs.OpEqualTo, 0, 0)
	p.Syscalls[0].Args[0].Index = 6
	_, err = Compile(p)
	require.ErrorContains(t, err, "argument 6")
	p = profileOf(specs.OpEqualTo, 0, 0)
	p.DefaultAction = specs.ActNotify
	_, err = Compile(p)
	require.ErrorContains(t, err, "not supported")
	p.Architectures = []specs.Arch{specs.ArchMIPS}
	_, err = Compile(p)
	require.ErrorContains(t, err, "no table")
}

func TestMachines(t *testing.T) {
	for _, arches := range [][]specs.Arch{
		nil, {specs.ArchX86_64, specs.ArchX86, specs.ArchX32}, {specs.ArchARM, specs.ArchAARCH64},
	} {
		s := &specs.Spec{Linux: &specs.Linux{}, Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_SYS_CHROOT"}}}}
		p := seccomp.DefaultProfile(s)
		p.Architectures = arches
		raw, err := Compile(p)
		require.NoError(t, err)
		require.Less(t, len(raw), 3000)
		for _, a := range arches {
			m := machines[a]
			nr := func(name string) uint32 { return uint32(numbersOf(m)[name] | m.SeccompMask) }
			require.EqualValues(t, retAllow, decisionOf(t, raw, call{arch: m.ID, nr: nr("execve")}), a)
			require.EqualValues(t, retAllow, decisionOf(t, raw, call{arch: m.ID, nr: nr("chroot")}), a)
			for _, name := range []string{"mount", "setns", "unshare", "bpf", "open_by_handle_at", "kexec_load", "init_module"} {
				require.EqualValues(t, retErrno|uint32(unix.EPERM), decisionOf(t, raw, call{arch: m.ID, nr: nr(name)}), "%s %s", a, name)
			}
			clone := call{arch: m.ID, nr: nr("clone")}
			require.EqualValues(t, retAllow, decisionOf(t, raw, clone))
			clone.args[0] = unix.CLONE_NEWUSER
			require.EqualValues(t, retErrno|uint32(unix.EPERM), decisionOf(t, raw, clone))
			require.EqualValues(t, retErrno|uint32(unix.ENOSYS), decisionOf(t, raw, call{arch: m.ID, nr: nr("clone3")}))
		}
	}
}
