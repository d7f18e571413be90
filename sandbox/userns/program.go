package userns

import (
	"errors"
	"fmt"
	"os/exec"
	"path"
	"slices"
	"strings"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/userns/script"
)

// program is a program to be executed in a sandbox.
type program struct {
	args, env []string
	cwd       string
	user      specs.User
	// bounding are the capabilities that the program may ever have; held those
	// that it starts with.
	bounding, held uint64
	noNewPrivs     bool
	rlimits        []specs.POSIXRlimit
	filter         []bpf.RawInstruction
}

// notFound is what the search of a program is for, in errors.
const notFound = "find program"

// newProgram returns the program that a spec describes.
// home is the home directory of its user.
func newProgram(sp *specs.Process, home string, filter []bpf.RawInstruction) (program, error) {
	p := program{args: sp.Args, cwd: sp.Cwd, user: sp.User, noNewPrivs: sp.NoNewPrivileges, rlimits: sp.Rlimits, filter: filter}
	var err error
	if p.env, err = environment(sp.Env, home); err != nil {
		return p, err
	}
	if p.bounding, err = capabilitySet(sp.Capabilities.Bounding); err != nil {
		return p, err
	}
	p.held, err = capabilitySet(sp.Capabilities.Effective)
	return p, err
}

// environment returns env without duplicates, of which the last counts, and with
// HOME.
func environment(env []string, home string) ([]string, error) {
	seen := map[string]bool{}
	var out []string
	for _, e := range slices.Backward(env) {
		name, value, ok := strings.Cut(e, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("environment variable %.40q: want NAME=value", e)
		}
		if seen[name] || name == "HOME" && value == "" {
			continue
		}
		seen[name] = true
		out = append(out, e)
	}
	slices.Reverse(out)
	if !seen["HOME"] {
		out = append(out, "HOME="+home)
	}
	return out, nil
}

var capabilityBits = func() map[string]uint64 {
	bits := map[string]uint64{}
	for _, c := range capability.ListKnown() {
		bits["CAP_"+strings.ToUpper(c.String())] = 1 << c
	}
	return bits
}()

func capabilitySet(names []string) (set uint64, err error) {
	for _, n := range names {
		bit, ok := capabilityBits[n]
		if !ok {
			return 0, fmt.Errorf("unknown capability %s", n)
		}
		set |= bit
	}
	return set, nil
}

// start lets the process behind conn, with the given ID, become the program. init is
// set for the first process of a sandbox.
func (p *program) start(conn *script.Conn, pid int, init bool) error {
	if err := limits(pid, p.rlimits); err != nil {
		return err
	}
	s := script.New()
	if err := p.execute(s, init); err != nil {
		return err
	}
	return p.started(conn.Execute(s))
}

// execute adds to s what turns its process into the program.
func (p *program) execute(s *script.Script, init bool) error {
	lastCap, err := capability.LastCap()
	if err != nil {
		return fmt.Errorf("list capabilities of the kernel: %w", err)
	}
	shared := image{
		args: s.Pointers(p.args), env: s.Pointers(p.env),
		groups: s.Put(groups(p.user.AdditionalGids)),
		cap:    s.Put(words32(unix.LINUX_CAPABILITY_VERSION_3, 0)),
		held:   s.Put(words32(uint32(p.held), uint32(p.held), 0, uint32(p.held>>32), uint32(p.held>>32), 0)),
		last:   int(lastCap), init: init,
	}
	if len(p.filter) > 0 {
		shared.filter = s.Words(uint64(len(p.filter)), uint64(s.Put(filterBytes(p.filter))))
	}
	// Root may enter a directory that its user may not, and the other way round.
	entered := s.Label()
	s.For("change to directory %s", p.cwd)
	s.Do(unix.SYS_CHDIR, p.cwd).Expect(unix.EACCES, unix.EPERM).OnZero(entered)
	p.become(s, shared, true)
	s.Place(entered)
	p.become(s, shared, false)
	return nil
}

// image holds addresses of what both ends of execute need.
type image struct {
	args, env, groups, cap, held, filter script.Addr
	last                                 int
	init                                 bool
}

// become gives up privileges and executes the program.
func (p *program) become(s *script.Script, m image, chdir bool) {
	s.For("limit capabilities")
	for c := range m.last + 1 {
		if p.bounding&(1<<c) == 0 {
			s.Do(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		}
	}
	s.Do(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)
	if p.noNewPrivs {
		s.For("set no_new_privs")
		s.Do(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	if m.filter != 0 {
		// Without no_new_privs this needs a capability that is about to go.
		s.For("filter system calls")
		s.Do(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, m.filter)
	}
	s.For("become user %d:%d", p.user.UID, p.user.GID)
	s.Do(unix.SYS_SETGROUPS, len(p.user.AdditionalGids), m.groups)
	s.Do(unix.SYS_SETRESGID, p.user.GID, p.user.GID, p.user.GID)
	s.Do(unix.SYS_SETRESUID, p.user.UID, p.user.UID, p.user.UID)
	if chdir {
		s.For("change to directory %s", p.cwd)
		s.Do(unix.SYS_CHDIR, p.cwd)
	}
	s.For("set capabilities")
	s.Do(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0, 0, 0, 0)
	s.Do(unix.SYS_CAPSET, m.cap, m.held)
	if m.init {
		// The change of user has cleared it.
		s.For("end with the agent")
		s.Do(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, int(unix.SIGKILL), 0, 0, 0)
	}
	p.find(s, m)
}

// find executes the program, which is searched as execvp does when its name has no
// slash.
func (p *program) find(s *script.Script, m image) {
	execve := func(file string) {
		s.For("execute %s", file)
		s.Do(unix.SYS_EXECVE, file, m.args, m.env)
	}
	name := p.args[0]
	if strings.Contains(name, "/") {
		execve(name)
		return
	}
	var files []string
	if name != "" {
		for _, dir := range strings.Split(p.path(), ":") {
			if path.IsAbs(dir) {
				files = append(files, path.Join(dir, name))
			}
		}
	}
	s.For(notFound)
	found := make([]*script.Label, len(files))
	for i, f := range files {
		found[i] = s.Label()
		next := s.Label()
		none := []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.EACCES, unix.ELOOP, unix.ENAMETOOLONG}
		s.Do(unix.SYS_FACCESSAT, unix.AT_FDCWD, f+"/.", 0).Expect(none...).OnZero(next) // a directory
		s.Do(unix.SYS_FACCESSAT, unix.AT_FDCWD, f, 1).Expect(none...).OnZero(found[i])  // X_OK
		s.Place(next)
	}
	s.Do(unix.SYS_CLOSE, ^uint64(0)) // fails
	for i, f := range files {
		s.Place(found[i])
		execve(f)
	}
}

// path returns the program's own PATH.
func (p *program) path() string {
	for _, e := range p.env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			return v
		}
	}
	return ""
}

// started turns the error of a script into one that users understand.
func (p *program) started(err error) error {
	var call *script.CallError
	if errors.As(err, &call) && call.What == notFound {
		return &exec.Error{Name: p.args[0], Err: exec.ErrNotFound}
	}
	return err
}

func groups(ids []uint32) []byte { return words32(append(ids[:len(ids):len(ids)], 0)...) }

func words32(words ...uint32) []byte {
	b := make([]byte, 0, 4*len(words))
	for _, w := range words {
		b = append(b, byte(w), byte(w>>8), byte(w>>16), byte(w>>24))
	}
	return b
}

// filterBytes returns a filter as the kernel reads it.
func filterBytes(filter []bpf.RawInstruction) []byte {
	b := make([]byte, 0, 8*len(filter))
	for _, i := range filter {
		b = append(b, byte(i.Op), byte(i.Op>>8), i.Jt, i.Jf, byte(i.K), byte(i.K>>8), byte(i.K>>16), byte(i.K>>24))
	}
	return b
}

// limits sets the resource limits of a process that has not executed the program
// yet.
func limits(pid int, list []specs.POSIXRlimit) error {
	for _, l := range list {
		nr, ok := rlimits[l.Type]
		if !ok {
			return fmt.Errorf("unknown resource limit %q", l.Type)
		}
		if err := unix.Prlimit(pid, nr, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}, nil); err != nil {
			return fmt.Errorf("set %s: %w", l.Type, err)
		}
	}
	return nil
}

var rlimits = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}

// processOf returns the spec of a process of a step.
func processOf(p sandbox.Process, l sandbox.Limits, user sandbox.UserIDs, noNewPrivs bool) *specs.Process {
	sp := sandbox.ProcessSpec(hold(p, l), user, noNewPrivs)
	clamp(sp)
	return sp
}

// hold returns p with the resource limits of l. No file of a step can become larger
// than all of them together may be.
func hold(p sandbox.Process, l sandbox.Limits) sandbox.Process {
	p = l.Hold(p)
	if l.DiskBytes == 0 {
		return p
	}
	const fileSize = "RLIMIT_FSIZE"
	most := uint64(l.DiskBytes)
	for i, r := range p.Rlimits {
		if r.Type == fileSize {
			p.Rlimits[i].Soft, p.Rlimits[i].Hard = min(r.Soft, most), min(r.Hard, most)
			return p
		}
	}
	p.Rlimits = append(p.Rlimits, sandbox.Rlimit{Type: fileSize, Soft: most, Hard: most})
	return p
}

// clamp lowers the limit of open files to what this process may give: without
// CAP_SYS_RESOURCE none above its own.
func clamp(sp *specs.Process) {
	for i, l := range sp.Rlimits {
		var own unix.Rlimit
		if l.Type == "RLIMIT_NOFILE" && unix.Getrlimit(unix.RLIMIT_NOFILE, &own) == nil {
			sp.Rlimits[i].Hard = min(l.Hard, own.Max)
			sp.Rlimits[i].Soft = min(l.Soft, own.Max)
		}
	}
}
