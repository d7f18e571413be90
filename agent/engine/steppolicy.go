package engine

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/agent/steplimits"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// stepPolicy decides whether a step may run, as if nobody had looked at it before: the
// solver's word counts for nothing that is seen here.
type stepPolicy struct {
	// root is the state directory, without symlinks.
	root string
	// rules returns what holds for a domain; nil: only what holds for every step.
	rules func(Domain) StepRules
	// most returns the most that a step of a domain may use; nil: only rules say.
	most func(Domain) sandbox.Limits
	// fetch says what may be fetched; nil: anything.
	fetch *egress.Policy
}

// StepRules is what holds for the steps of a domain.
type StepRules struct {
	// Rules must all allow a step.
	Rules []policy.Rules
	// Defaults are the limits of a step that asks for none, cut to what Rules allow.
	Defaults policy.Limits
}

func newStepPolicy(cfg NodeConfig) *stepPolicy {
	return &stepPolicy{root: cfg.Root, rules: cfg.Rules, most: cfg.Limits, fetch: cfg.Fetch}
}

// of returns what holds for a domain.
func (p *stepPolicy) of(d Domain) StepRules {
	var r StepRules
	if p.rules != nil {
		r = p.rules(d)
	}
	if p.most != nil {
		r.Rules = append([]policy.Rules{{Name: "node", Max: steplimits.FromSandbox(p.most(d))}}, r.Rules...)
	}
	return r
}

// refused are all reasons against a step.
type refused []*policy.Denied

func (r refused) Error() string {
	all := make([]string, len(r))
	for i, d := range r {
		all[i] = d.Error()
	}
	return strings.Join(all, "; ")
}

// checkStep refuses a step that d may not run as it is about to be.
func (p *stepPolicy) checkStep(ctx context.Context, d Domain, meta executor.Meta, step *sandbox.Step) error {
	if !p.isLayer(step.Root) {
		return refused{{Field: "step.root", Name: "mount-source", Rule: "the root file system is refused: it is none of the build's layers"}}
	}
	of := vertexOf(ctx)
	s := processRequest(d, meta)
	var err error
	if s.Limits, err = asked(ctx, meta); err != nil {
		return err
	}
	for _, m := range step.Mounts {
		s.Mounts = append(s.Mounts, policy.Mount{Type: p.mountType(m, of.mounts), Destination: m.Destination, Size: tmpfsSize(m.Tree)})
	}
	return refusal(policy.CheckStep(p.of(d).Rules, s))
}

// asked returns the limits that a step asks for.
func asked(ctx context.Context, meta executor.Meta) (policy.Limits, error) {
	l, err := steplimits.Decode(vertexOf(ctx).limits)
	if err != nil {
		return policy.Limits{}, err
	}
	of, err := limitsOf(meta.LinuxResources, sandbox.Limits{})
	if err != nil {
		return policy.Limits{}, err
	}
	l.CPUMillis, l.MemoryBytes = of.CPUMillis, of.MemoryBytes
	for _, u := range meta.Ulimit {
		if strings.EqualFold(u.GetName(), "nofile") {
			l.OpenFiles = u.GetHard()
		}
	}
	return l, nil
}

// limits returns those that a step gets: what it asks for, else the default of its domain
// within what policy allows, else the most that this does.
func (p *stepPolicy) limits(ctx context.Context, d Domain, meta executor.Meta) (sandbox.Limits, error) {
	l, err := asked(ctx, meta)
	if err != nil {
		return sandbox.Limits{}, err
	}
	r := p.of(d)
	out := steplimits.ForSandbox(l.Or(r.Defaults, policy.Most(r.Rules)))
	if out.PIDs == 0 {
		out.PIDs = DefaultPIDs
	}
	return out, nil
}

// egressOf returns what a step of a domain may reach; nil: what those of everyone may.
// own is the list that its build gives itself.
func (p *stepPolicy) egressOf(d Domain, own string) (*egress.Policy, error) {
	narrow, err := steplimits.DecodeDestinations(own)
	if err != nil {
		return nil, err
	}
	rules := policy.Egress(p.of(d).Rules)
	if len(narrow)+len(rules) == 0 {
		return nil, nil
	}
	out := stepEgress(p.fetch)
	out.Rules, out.Narrow = func() []egress.Rules { return rules }, narrow
	return out, nil
}

// checkProcess refuses one more process of a step that runs.
func (p *stepPolicy) checkProcess(d Domain, meta executor.Meta) error {
	return refusal(policy.CheckStep(nil, processRequest(d, meta)))
}

func refusal(denied []*policy.Denied) error {
	if len(denied) == 0 {
		return nil
	}
	return refused(denied)
}

// processRequest is what meta asks for, in terms of policy.
func processRequest(d Domain, meta executor.Meta) policy.Step {
	s := policy.Step{
		Class: string(d.Sandbox), Network: networkOf(meta.NetMode), Security: strings.ToLower(meta.SecurityMode.String()),
		CgroupParent: meta.CgroupParent, ProxyNetwork: meta.Proxy != nil,
	}
	for _, c := range meta.CDIDevices {
		s.Devices = append(s.Devices, c.GetName())
	}
	if r := meta.LinuxResources; r.GetCpusetCpus() != "" || r.GetCpusetMems() != "" {
		s.Processors = r.GetCpusetCpus() + "/" + r.GetCpusetMems()
	}
	for _, u := range meta.Ulimit {
		s.Rlimits = append(s.Rlimits, u.GetName())
	}
	return s
}

// networkOf returns the network of a mode; one that is none of a sandbox has the solver's
// name, or its number.
func networkOf(mode pb.NetMode) string {
	switch mode {
	case pb.NetMode_UNSET:
		return policy.NetworkEgress
	case pb.NetMode_NONE:
		return policy.NetworkNone
	}
	return strings.ToLower(mode.String())
}

// mountType tells the type of a mount by what it shows; "": something else of the node. A
// cache lies where layers do, so that it is one only types can say.
func (p *stepPolicy) mountType(m sandbox.Mount, types map[string]string) string {
	switch {
	case m.Tree.Tmpfs != nil:
		return policy.MountTmpfs
	case m.Socket:
		if p.madeForStep(m.Tree.Dir, ".buildkit-ssh-sock") {
			return policy.MountSSH
		}
		return ""
	case p.isLayer(m.Tree):
		if types[m.Destination] == policy.MountCache {
			return policy.MountCache
		}
		return policy.MountBind
	case p.madeForStep(m.Tree.Dir, "buildkit-secrets"):
		return policy.MountSecret
	case m.Readonly && (p.madeForStep(m.Tree.Dir, "buildkit-qemu-emulator") || p.madeForStep(m.Tree.Dir, "buildkit-metadata")):
		// The second is what a front end is told about itself.
		return policy.MountBind
	}
	return ""
}

// isLayer tells whether all that a tree shows are snapshots of the store.
func (p *stepPolicy) isLayer(t sandbox.Tree) bool {
	dirs := append([]string{}, t.Lower...)
	for _, d := range []string{t.Dir, t.Upper, t.Work} {
		if d != "" {
			dirs = append(dirs, d)
		}
	}
	for _, d := range dirs {
		if !p.isSnapshot(d) {
			return false
		}
	}
	return len(dirs) > 0
}

// isSnapshot tells whether dir is a directory of a snapshot.
func (p *stepPolicy) isSnapshot(dir string) bool {
	rel, err := filepath.Rel(filepath.Join(p.root, "store", "snapshots", "snapshots"), dir)
	if err != nil || filepath.Clean(dir) != dir {
		return false
	}
	number, kind, ok := strings.Cut(rel, "/")
	if _, err := strconv.ParseUint(number, 10, 64); err != nil || !ok || (kind != "fs" && kind != "work") {
		return false
	}
	// A path of a snapshot has no symlink that a step could have made: they are above
	// what steps see.
	st, err := os.Lstat(dir)
	return err == nil && st.IsDir()
}

// madeForStep tells whether file is what BuildKit makes in a temporary directory of the
// name prefix for one step.
func (p *stepPolicy) madeForStep(file, prefix string) bool {
	rel, err := filepath.Rel(filepath.Join(p.root, "tmp"), file)
	if err != nil || filepath.Clean(file) != file || !filepath.IsLocal(rel) || !strings.HasPrefix(rel, prefix) {
		return false
	}
	st, err := os.Lstat(file)
	return err == nil && st.Mode()&(os.ModeSymlink|os.ModeDevice) == 0
}

func tmpfsSize(t sandbox.Tree) int64 {
	if t.Tmpfs == nil {
		return 0
	}
	return t.Tmpfs.Size
}
