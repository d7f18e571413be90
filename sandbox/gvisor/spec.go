package gvisor

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/stepfs"
)

// usual is the kind of sandbox that is kept ready.
func usual(network sandbox.NetworkMode) kind {
	return kind{network: network, hostname: sandbox.DefaultHostname}
}

// kindOf tells what kind of sandbox a step needs.
func kindOf(step *sandbox.Step) kind {
	k := usual(step.Network)
	if step.Hostname != "" {
		k.hostname = step.Hostname
	}
	for _, m := range step.Mounts {
		k.sockets = k.sockets || m.Socket
	}
	return k
}

// prepare mounts what the step sees and makes the spec of its container.
func (s *stepRun) prepare() (err error) {
	if err := s.mountRoot(); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if s.ids, err = sandbox.ResolveUser(s.rootfs, s.step.Process.User); err != nil {
		return err
	}
	s.noNewPrivs = !sandbox.NeedsSetuid(s.rootfs)
	mounts, err := s.prepareMounts()
	if err != nil {
		return err
	}
	if !s.overlaid() {
		// The mount points are made in the tree itself.
		var dests []string
		for _, m := range mounts {
			dests = append(dests, m.Destination)
		}
		stubs := sandbox.RecordStubs(s.step.Root, dests)
		s.defers = append([]func() error{stubs.Remove}, s.defers...)
	}
	if err := s.makeSpec(mounts); err != nil {
		return err
	}
	if err := s.showRoot(); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	return s.showMounts()
}

// prepareMounts mounts the step's mounts where the node sees them and returns
// them for the spec, with /etc/hosts and /etc/resolv.conf.
func (s *stepRun) prepareMounts() ([]specs.Mount, error) {
	var mounts []specs.Mount
	etc, err := sandbox.WriteEtcFiles(s.tmp, s.step, netNameservers(s.box.net))
	if err != nil {
		return nil, err
	}
	for _, dest := range []string{"/etc/hosts", "/etc/resolv.conf"} {
		mounts = append(mounts, specs.Mount{Destination: dest, Type: "bind", Source: etc[dest], Options: []string{"bind", "ro"}})
	}
	dir := filepath.Join(s.tmp, "mounts")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	for i, m := range s.step.Mounts {
		if m.Tree.Tmpfs != nil {
			opts := []string{"nosuid", "nodev", "mode=1777"}
			if m.Tree.Tmpfs.Size > 0 {
				opts = append(opts, "size="+strconv.FormatInt(m.Tree.Tmpfs.Size, 10))
			}
			if m.Readonly {
				opts = append(opts, "ro")
			}
			mounts = append(mounts, specs.Mount{Destination: m.Destination, Type: "tmpfs", Source: "tmpfs", Options: opts})
			continue
		}
		target := filepath.Join(dir, strconv.Itoa(i))
		unmount, err := stepfs.Make(m.Tree, target, stepfs.Options{Readonly: m.Readonly, Subpath: m.Subpath, Volatile: true})
		if err != nil {
			return nil, fmt.Errorf("mount at %s: %w", m.Destination, err)
		}
		s.defers = append(s.defers, unmount)
		mode := "rw"
		if m.Readonly {
			mode = "ro"
		}
		mounts = append(mounts, specs.Mount{Destination: m.Destination, Type: "bind", Source: target, Options: []string{"rbind", mode}})
	}
	return mounts, nil
}

// makeSpec makes the spec of the step's container, and the mount points in its
// root.
func (s *stepRun) makeSpec(mounts []specs.Mount) error {
	spec := sandbox.BaseSpec(s.step, s.step.Process, s.ids, "", s.noNewPrivs)
	spec.Root.Path = "/"
	spec.Root.Readonly = s.readonly
	// The sandbox has a kernel of its own; the node's filter list means nothing
	// there and costs time on every call.
	spec.Linux.Seccomp = nil
	// runsc would hide an empty /tmp of the image below a tmpfs, and files would
	// be missing in the layer. It does not where the spec has a mount there, of
	// whatever kind; it ignores kinds that it does not know.
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/tmp", Type: "kiln-none", Source: "none"})
	if err := s.placeMounts(spec, mounts); err != nil {
		return err
	}
	s.spec = spec
	return nil
}

// placeMounts adds the step's mounts and makes the mount points of all.
func (s *stepRun) placeMounts(spec *specs.Spec, mounts []specs.Mount) error {
	for _, m := range mounts {
		if path.Clean(m.Destination) == "/tmp" {
			spec.Mounts = spec.Mounts[:len(spec.Mounts)-1]
			break
		}
	}
	all := append([]specs.Mount{}, mounts...)
	for _, m := range spec.Mounts {
		if m.Type != "kiln-none" && !strings.HasPrefix(m.Destination, "/dev/") {
			all = append(all, m)
		}
	}
	if err := makeMountPoints(s.rootfs, all); err != nil {
		return err
	}
	for _, m := range mounts {
		var err error
		if m.Destination, err = resolveMountPoint(s.rootfs, m.Destination); err != nil {
			return err
		}
		spec.Mounts = append(spec.Mounts, m)
	}
	return nil
}

// showMounts shows the bind mounts of the spec to the sandbox, in their order.
func (s *stepRun) showMounts() error {
	for i := range s.spec.Mounts {
		m := &s.spec.Mounts[i]
		if m.Type != "bind" {
			continue
		}
		if err := s.show(m.Source, slices.Contains(m.Options, "ro"), mountConf{Lower: lowerServed, Upper: upperNone}); err != nil {
			return fmt.Errorf("mount at %s: %w", m.Destination, err)
		}
		m.Source = "/"
	}
	return nil
}

// capabilityBits turns names into the mask that the sandbox takes.
var capabilityNumbers = map[string]uint{
	"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH,
	"CAP_FOWNER": unix.CAP_FOWNER, "CAP_FSETID": unix.CAP_FSETID, "CAP_KILL": unix.CAP_KILL, "CAP_SETGID": unix.CAP_SETGID,
	"CAP_SETUID": unix.CAP_SETUID, "CAP_SETPCAP": unix.CAP_SETPCAP, "CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
	"CAP_SYS_CHROOT": unix.CAP_SYS_CHROOT, "CAP_MKNOD": unix.CAP_MKNOD, "CAP_AUDIT_WRITE": unix.CAP_AUDIT_WRITE,
	"CAP_SETFCAP": unix.CAP_SETFCAP,
}

func capabilityBits(names []string) (uint64, error) {
	var mask uint64
	for _, n := range names {
		bit, ok := capabilityNumbers[n]
		if !ok {
			return 0, fmt.Errorf("capability %s: gVisor sandboxes do not give it", n)
		}
		mask |= 1 << bit
	}
	return mask, nil
}

func capabilities(c *specs.LinuxCapabilities) (*taskCapabilities, error) {
	out := &taskCapabilities{}
	if c == nil {
		return out, nil
	}
	for _, set := range []struct {
		to    *uint64
		names []string
	}{
		{&out.BoundingCaps, c.Bounding}, {&out.EffectiveCaps, c.Effective}, {&out.PermittedCaps, c.Permitted},
		{&out.InheritableCaps, c.Inheritable}, {&out.AmbientCaps, c.Ambient},
	} {
		mask, err := capabilityBits(set.names)
		if err != nil {
			return nil, err
		}
		*set.to = mask
	}
	return out, nil
}
