// Package filter turns the seccomp profile of an OCI runtime spec into the program
// that the kernel runs at each system call.
//
// It promises what runc does with the same profile: names that a machine has no
// system call for are left out; calls with a number above all that the profile
// knows get ENOSYS, so that programs fall back to older ones; calls by the
// conventions of a machine that the profile does not name end the process. A test
// compares the programs with those of runc, call by call. It never installs a
// program.
package filter

import (
	"fmt"
	"runtime"
	"slices"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data, which the program sees.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

const (
	// x32Bit is set in the numbers of the system calls of x32, which has the
	// architecture number of x86-64.
	x32Bit = 0x40000000
	// noCall is the number that a tracer sets to have no call made.
	noCall = 0xffffffff
	// maxProgram is how many instructions the kernel takes.
	maxProgram = 4096

	retKill   = 0
	retTrap   = 0x00030000
	retErrno  = 0x00050000
	retLog    = 0x7ffc0000
	retAllow  = 0x7fff0000
	retKillPr = 0x80000000
)

// machines are the tables of the machines that a profile can name.
var machines = map[specs.Arch]*arch.Info{
	specs.ArchX86_64: arch.X86_64, specs.ArchX86: arch.I386, specs.ArchX32: arch.X32,
	specs.ArchAARCH64: arch.AARCH64, specs.ArchARM: arch.ARM,
}

// natives are the machines whose conventions programs of this one normally use.
var natives = map[string]specs.Arch{"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64}

// Native returns the machine that this program is built for.
func Native() (specs.Arch, error) {
	native, ok := natives[runtime.GOARCH]
	if !ok {
		return "", fmt.Errorf("no system call filter for %s", runtime.GOARCH)
	}
	return native, nil
}

// Compile returns the program for a profile. A profile that names no machine is
// for Native.
func Compile(profile *specs.LinuxSeccomp) ([]bpf.RawInstruction, error) {
	names := profile.Architectures
	if len(names) == 0 {
		native, err := Native()
		if err != nil {
			return nil, err
		}
		names = []specs.Arch{native}
	}
	// The tables of x86-64 and x32 are told apart by a bit of the number.
	var order []arch.AuditArch
	sections := map[arch.AuditArch][]*arch.Info{}
	for _, name := range names {
		m := machines[name]
		if m == nil {
			return nil, fmt.Errorf("system call filter: no table for %s", name)
		}
		if sections[m.ID] == nil {
			order = append(order, m.ID)
		}
		sections[m.ID] = append(sections[m.ID], m)
	}
	prog := []bpf.Instruction{bpf.LoadAbsolute{Off: offArch, Size: 4}}
	for _, id := range order {
		section, err := compileSection(profile, sections[id])
		if err != nil {
			return nil, err
		}
		prog = append(prog,
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(id), SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(section))})
		prog = append(prog, section...)
	}
	prog = append(prog, bpf.RetConstant{Val: retKill})
	if len(prog) > maxProgram {
		return nil, fmt.Errorf("system call filter has %d instructions, more than the %d that are possible", len(prog), maxProgram)
	}
	raw, err := bpf.Assemble(prog)
	if err != nil {
		return nil, fmt.Errorf("assemble system call filter: %w", err)
	}
	return raw, nil
}

// compileSection returns the part for machines of one architecture number.
func compileSection(profile *specs.LinuxSeccomp, infos []*arch.Info) ([]bpf.Instruction, error) {
	def, err := action(profile.DefaultAction, profile.DefaultErrnoRet)
	if err != nil {
		return nil, err
	}
	out := []bpf.Instruction{bpf.LoadAbsolute{Off: offNumber, Size: 4}}
	if infos[0].ID != arch.X86_64.ID {
		calls, err := compileCalls(profile, infos[0], def)
		return append(out, calls...), err
	}
	// Without a table for one of them, its calls end the process.
	parts := [2][]bpf.Instruction{{bpf.RetConstant{Val: retKill}}, {bpf.RetConstant{Val: retKill}}}
	for _, m := range infos {
		i := 0
		if m.SeccompMask != 0 {
			i = 1
		}
		if parts[i], err = compileCalls(profile, m, def); err != nil {
			return nil, err
		}
	}
	out = append(out,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: noCall, SkipFalse: 1},
		bpf.RetConstant{Val: def},
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: x32Bit, SkipFalse: 1},
		bpf.Jump{Skip: uint32(len(parts[0]))})
	return append(append(out, parts[0]...), parts[1]...), nil
}

// rule is what happens to a call whose arguments fulfil all conditions.
type rule struct {
	args   []specs.LinuxSeccompArg
	action uint32
}

// segment is a range of call numbers, up to the next segment, with the same rules.
type segment struct {
	first uint32
	rules []rule
}

// compileCalls returns the decision about the calls of one machine, whose number is
// loaded already.
func compileCalls(profile *specs.LinuxSeccomp, m *arch.Info, def uint32) ([]bpf.Instruction, error) {
	rules, last, err := rulesOf(profile, m, def)
	if err != nil {
		return nil, err
	}
	numbers := make([]uint32, 0, len(rules))
	for nr := range rules {
		numbers = append(numbers, nr)
	}
	slices.Sort(numbers)
	base := uint32(m.SeccompMask)
	segments := []segment{{first: base}}
	add := func(first uint32, rules []rule) {
		top := &segments[len(segments)-1]
		switch {
		case simple(top.rules, def) == simple(rules, def) && conditional(top.rules) == conditional(rules) && !conditional(rules):
		case top.first == first:
			top.rules = rules
		default:
			segments = append(segments, segment{first, rules})
		}
	}
	for _, nr := range numbers {
		add(nr, rules[nr])
		add(nr+1, nil)
	}
	add(last+1, []rule{{action: retErrno | uint32(unix.ENOSYS)}})
	return search(segments, def)
}

// conditional tells whether a decision depends on arguments.
func conditional(rules []rule) bool { return len(rules) > 0 && len(rules[0].args) > 0 }

// simple returns the decision that depends on no argument.
func simple(rules []rule, def uint32) uint32 {
	if len(rules) == 0 || conditional(rules) {
		return def
	}
	return rules[0].action
}

// rulesOf returns the rules of each call number, and the highest number that the
// profile names.
func rulesOf(profile *specs.LinuxSeccomp, m *arch.Info, def uint32) (map[uint32][]rule, uint32, error) {
	names := numbersOf(m)
	rules := map[uint32][]rule{}
	var last uint32
	for _, call := range profile.Syscalls {
		act, err := action(call.Action, call.ErrnoRet)
		if err != nil {
			return nil, 0, err
		}
		for _, name := range call.Names {
			number, ok := names[name]
			if !ok {
				continue
			}
			nr := uint32(number) | uint32(m.SeccompMask)
			last = max(last, nr)
			if act == def {
				continue
			}
			switch have := rules[nr]; {
			case len(call.Args) == 0:
				rules[nr] = []rule{{action: act}}
			case len(have) > 0 && !conditional(have):
			case repeated(call.Args):
				// Conditions on one argument are alternatives.
				for _, a := range call.Args {
					rules[nr] = append(rules[nr], rule{[]specs.LinuxSeccompArg{a}, act})
				}
			default:
				rules[nr] = append(have, rule{call.Args, act})
			}
		}
	}
	return rules, last, nil
}

// numbersOf returns the number of each call. Where x32 has a call of its own, the
// table has that of x86-64 too, which is a lower one and does not work.
func numbersOf(m *arch.Info) map[string]int {
	names := make(map[string]int, len(m.SyscallNumbers))
	for nr, name := range m.SyscallNumbers {
		names[name] = max(names[name], nr)
	}
	return names
}

// repeated tells whether two conditions are on one argument.
func repeated(args []specs.LinuxSeccompArg) bool {
	seen := map[uint]bool{}
	for _, a := range args {
		if seen[a.Index] {
			return true
		}
		seen[a.Index] = true
	}
	return false
}

// search returns a binary search for the segment of the loaded call number.
func search(segments []segment, def uint32) ([]bpf.Instruction, error) {
	if len(segments) == 1 {
		return decide(segments[0].rules, def)
	}
	middle := len(segments) / 2
	low, err := search(segments[:middle], def)
	if err != nil {
		return nil, err
	}
	high, err := search(segments[middle:], def)
	if err != nil {
		return nil, err
	}
	test := bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: segments[middle].first}
	out := []bpf.Instruction{test}
	if len(low) > 255 {
		test.SkipFalse = 1
		out = []bpf.Instruction{test, bpf.Jump{Skip: uint32(len(low))}}
	} else {
		test.SkipTrue = uint8(len(low))
		out[0] = test
	}
	return append(append(out, low...), high...), nil
}

// decide returns the instructions for one call.
func decide(rules []rule, def uint32) ([]bpf.Instruction, error) {
	if !conditional(rules) {
		return []bpf.Instruction{bpf.RetConstant{Val: simple(rules, def)}}, nil
	}
	var out []bpf.Instruction
	for _, r := range rules {
		block, err := condition(r)
		if err != nil {
			return nil, err
		}
		out = append(out, block...)
	}
	return append(out, bpf.RetConstant{Val: def}), nil
}

// condition returns the instructions that end with the rule's action when all its
// conditions hold, and go on behind them when not.
func condition(r rule) ([]bpf.Instruction, error) {
	// Built from the end, where the distance to what follows is known.
	out := []bpf.Instruction{bpf.RetConstant{Val: r.action}}
	for _, a := range slices.Backward(r.args) {
		block, err := compare(a, len(out))
		if err != nil {
			return nil, err
		}
		out = append(block, out...)
	}
	return out, nil
}

// compare returns the instructions that go on behind them when a holds, and rest
// instructions further when not.
func compare(a specs.LinuxSeccompArg, rest int) ([]bpf.Instruction, error) {
	if a.Index > 5 || rest > 200 {
		return nil, fmt.Errorf("system call filter: condition on argument %d of a long list", a.Index)
	}
	hi, lo := uint32(a.Value>>32), uint32(a.Value)
	load := func(half uint32) bpf.Instruction {
		return bpf.LoadAbsolute{Off: offArgs + 8*uint32(a.Index) + 4*half, Size: 4}
	}
	miss := uint8(rest)
	switch a.Op {
	case specs.OpEqualTo:
		return []bpf.Instruction{
			load(1), bpf.JumpIf{Cond: bpf.JumpEqual, Val: hi, SkipFalse: miss + 2},
			load(0), bpf.JumpIf{Cond: bpf.JumpEqual, Val: lo, SkipFalse: miss},
		}, nil
	case specs.OpNotEqual:
		return []bpf.Instruction{
			load(1), bpf.JumpIf{Cond: bpf.JumpEqual, Val: hi, SkipFalse: 2},
			load(0), bpf.JumpIf{Cond: bpf.JumpEqual, Val: lo, SkipTrue: miss},
		}, nil
	case specs.OpMaskedEqual:
		want := a.ValueTwo
		return []bpf.Instruction{
			load(1), bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: hi},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(want >> 32), SkipFalse: miss + 3},
			load(0), bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: lo},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(want), SkipFalse: miss},
		}, nil
	case specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual:
		return order(a.Op, hi, lo, load, miss), nil
	}
	return nil, fmt.Errorf("system call filter: unknown comparison %q", a.Op)
}

// order compares which of two 64-bit numbers is the larger one.
func order(op specs.LinuxSeccompOperator, hi, lo uint32, load func(uint32) bpf.Instruction, miss uint8) []bpf.Instruction {
	last := bpf.JumpIf{Val: lo, SkipFalse: miss}
	upper := bpf.JumpIf{Cond: bpf.JumpLessThan, Val: hi, SkipTrue: 3}
	switch op {
	case specs.OpLessThan:
		last.Cond = bpf.JumpLessThan
	case specs.OpLessEqual:
		last.Cond = bpf.JumpLessOrEqual
	case specs.OpGreaterThan:
		last.Cond, upper.Cond = bpf.JumpGreaterThan, bpf.JumpGreaterThan
	case specs.OpGreaterEqual:
		last.Cond, upper.Cond = bpf.JumpGreaterOrEqual, bpf.JumpGreaterThan
	}
	// The upper halves decide unless they are equal.
	return []bpf.Instruction{load(1), upper, bpf.JumpIf{Cond: bpf.JumpEqual, Val: hi, SkipFalse: miss + 2}, load(0), last}
}

// action returns what the program returns for an action.
func action(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	switch a {
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActErrno:
		code := uint32(unix.EPERM)
		if errno != nil {
			code = uint32(*errno) & 0xffff
		}
		return retErrno | code, nil
	case specs.ActKill, specs.ActKillThread:
		return retKill, nil
	case specs.ActKillProcess:
		return retKillPr, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActLog:
		return retLog, nil
	}
	return 0, fmt.Errorf("system call filter: action %q is not supported", a)
}
