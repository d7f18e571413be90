package policy

import (
	"cmp"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
)

// Types of mounts that a step may have, as a Dockerfile names them.
const (
	MountBind   = "bind"
	MountCache  = "cache"
	MountSecret = "secret"
	MountSSH    = "ssh"
	MountTmpfs  = "tmpfs"
)

// MaxMounts is how many mounts a step may have.
const MaxMounts = 512

// shm is where a step's shared memory is, which every step has.
const shm = "/dev/shm"

var (
	// restrictable are the types that policies are about. Layers of the build itself
	// (bind) are what it is made of.
	restrictable = []string{MountCache, MountSecret, MountSSH, MountTmpfs}
	mountTypes   = append([]string{MountBind}, restrictable...)
	// rlimits are what a step may set with --ulimit.
	rlimits = []string{"core", "cpu", "data", "fsize", "memlock", "msgqueue", "nofile", "nproc", "rss", "sigpending", "stack"}
	// reserved are directories of a step that are the sandbox's.
	reserved = []string{"/proc", "/sys", "/dev"}
)

// Rlimits lists the resource limits that a step may set for its processes.
func Rlimits() []string { return slices.Clone(rlimits) }

// AllowsRlimit tells whether a step may set a resource limit, such as "nofile".
func AllowsRlimit(name string) bool { return slices.Contains(rlimits, strings.ToLower(name)) }

// MountType is the type of a mount and the field of the request that asks for it.
type MountType struct {
	Field string
	Type  string
}

// Step is one step as it is about to run, by the words of whoever asks for it.
type Step struct {
	// Class of sandbox.
	Class string
	// Network is what it can reach.
	Network string
	// Security is "sandbox"; there is nothing else.
	Security string
	// Devices are devices of the node.
	Devices []string
	// CgroupParent and Processors are places on the node.
	CgroupParent, Processors string
	// ProxyNetwork asks for a network that is watched.
	ProxyNetwork bool
	// Rlimits are names of resource limits, such as "nofile".
	Rlimits []string
	// Mounts over the root.
	Mounts []Mount
	// Limits that are asked for; what is left out is not checked.
	Limits Limits
}

// Mount is a mount of a step.
type Mount struct {
	// Type is one of those that this package names, by what is mounted; "": something of
	// the node that no step may have.
	Type string
	// Destination is where.
	Destination string
	// Size in bytes, of a tmpfs; 0 is no bound.
	Size int64
}

// CheckStep returns every reason against a step as *Denied: the rules that hold for every
// step, and all. It trusts nobody to have checked anything before.
func CheckStep(all []Rules, s Step) []*Denied {
	var out []*Denied
	by := func(policy string) denyFunc {
		return func(field, name, rule string, args ...any) {
			out = append(out, &Denied{Policy: policy, Field: field, Name: name, Rule: fmt.Sprintf(rule, args...)})
		}
	}
	checkEvery(by(""), s)
	for i, m := range s.Mounts {
		checkMount(by(""), fmt.Sprintf("step.mounts[%d]", i), m)
	}
	for _, p := range all {
		deny := by(p.Name)
		checkClass(deny, "step.sandbox", s.Class, p)
		checkNetwork(deny, "step.network", s.Network, p)
		// A limit that nobody asks for is given by who runs the step.
		checkLimits(deny, stepField, s.Limits.Or(Limits{}, p.Max), p.Max)
		for i, m := range s.Mounts {
			if m.Destination == shm && m.Type == MountTmpfs {
				checkLimits(deny, stepField, Limits{ShmBytes: cmp.Or(m.Size, math.MaxInt64)}, Limits{ShmBytes: p.Max.ShmBytes})
				continue
			}
			checkMountType(deny, MountType{Field: fmt.Sprintf("step.mounts[%d]", i), Type: m.Type}, p.Mounts)
		}
	}
	return out
}

func stepField(l limit) string {
	if l.key == "" {
		return "step.timeout"
	}
	return "step.limits[" + l.key + "]"
}

// checkEvery has the rules that hold for every step whatever policies say.
func checkEvery(deny denyFunc, s Step) {
	if !slices.Contains(classes, s.Class) {
		deny("step.sandbox", "sandbox-class", "sandbox %q is unknown", s.Class)
	}
	if !slices.Contains(networks, s.Network) {
		deny("step.network", "network-mode", "network mode %q is refused: a step never shares the node's network", s.Network)
	}
	if s.Security != "sandbox" {
		deny("step.security", "security-mode", "security mode %q is refused: there is no way out of the sandbox", s.Security)
	}
	if len(s.Devices) > 0 {
		deny("step.devices", "devices", "devices are refused: a step gets none of the node's")
	}
	if s.CgroupParent != "" {
		deny("step.cgroupParent", "cgroup-parent", "cgroup parent is refused: the agent places steps")
	}
	if s.Processors != "" {
		deny("step.processors", "processors", "choice of processors is refused: the agent places steps")
	}
	if s.ProxyNetwork {
		deny("step.network", "network-mode", "proxy network is refused: a step's network is its own")
	}
	for _, r := range s.Rlimits {
		if !AllowsRlimit(r) {
			deny("step.ulimits", "ulimits", "ulimit %q is refused: a step may set %s", r, strings.Join(rlimits, ", "))
		}
	}
	if len(s.Mounts) > MaxMounts {
		deny("step.mounts", "mount-count", "%d mounts are refused: a step may have %d", len(s.Mounts), MaxMounts)
	}
	checkLimits(deny, stepField, s.Limits, Limits{})
}

func checkMount(deny denyFunc, field string, m Mount) {
	if !slices.Contains(mountTypes, m.Type) {
		deny(field, "mount-source", "what is to be mounted at %s is refused: it is neither of the build's layers nor made for the step", m.Destination)
	}
	if !path.IsAbs(m.Destination) || path.Clean(m.Destination) == "/" || strings.IndexByte(m.Destination, 0) >= 0 {
		deny(field, "mount-destination", "destination %q is refused: want an absolute path below /", m.Destination)
		return
	}
	d := path.Clean(m.Destination)
	for _, r := range reserved {
		if d == r || (strings.HasPrefix(d, r+"/") && d != shm) {
			deny(field, "mount-destination", "destination %s is refused: %s is the sandbox's", d, r)
		}
	}
}

func checkMountType(deny denyFunc, m MountType, allowed []string) {
	switch {
	case m.Type == MountBind:
	case !slices.Contains(restrictable, m.Type):
		deny(m.Field, "mounts", "mount type %q is unknown", m.Type)
	case len(allowed) > 0 && !slices.Contains(allowed, m.Type):
		deny(m.Field, "mounts.allowed", "mounts of type %s may not be used; allowed: %s", m.Type, strings.Join(allowed, ", "))
	}
}
