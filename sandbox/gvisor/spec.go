package gvisor

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/stepfs"
)

// prepareMounts shows the step's mounts on the node and returns them for the
// spec, with /etc/hosts and /etc/resolv.conf.
func (s *stepRun) prepareMounts(nameservers []netip.Addr) ([]specs.Mount, error) {
	var mounts []specs.Mount
	etc, err := sandbox.WriteEtcFiles(s.tmp, s.step, nameservers)
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

// writeSpec writes the bundle of the sandbox. Its first process is the pause
// program; it has the step's working directory so that the sandbox makes that.
func (s *stepRun) writeSpec(netns string, mounts []specs.Mount) error {
	init := sandbox.Process{Args: []string{"pause"}, Cwd: s.step.Process.Cwd, Rlimits: s.step.Process.Rlimits}
	spec := sandbox.BaseSpec(s.step, init, sandbox.UserIDs{}, netns, true)
	spec.Process.Capabilities = &specs.LinuxCapabilities{}
	spec.Root.Path = s.rootfs
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
	if parent := s.r.cfg.CgroupParent; parent != "" {
		spec.Linux.CgroupsPath = path.Join("/", parent, s.step.ID)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode the runtime spec: %w", err)
	}
	if err := os.Mkdir(s.bundle(), 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.bundle(), "config.json"), data, 0o600)
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
	spec.Mounts = append(spec.Mounts, mounts...)
	return makeMountPoints(s.rootfs, all)
}

func (s *stepRun) bundle() string { return filepath.Join(s.tmp, "bundle") }

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
