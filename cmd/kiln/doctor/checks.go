package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/docker/go-units"
	"github.com/google/nftables"
	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// minFree is how much disk a build should have.
const minFree = 2 << 30

var (
	all        = sandbox.Classes
	gvisorOnly = []sandbox.Class{sandbox.GVisor}
	usernsOnly = []sandbox.Class{sandbox.Userns}
)

// Checks returns the checks of a machine, in the order to read them.
func Checks(cfg Config) []Check {
	return []Check{
		{"privileges", all, privileges},
		{"kernel", usernsOnly, kernel},
		{"state directory", all, func(context.Context) (string, error) { return stateDir(cfg.Root) }},
		{"free disk", nil, func(context.Context) (string, error) { return freeDisk(cfg.Root) }},
		{"state lock", nil, func(context.Context) (string, error) { return lockHolder(cfg.Root) }},
		{"overlayfs", all, func(context.Context) (string, error) { return overlay(cfg.Root) }},
		{"userns step", usernsOnly, func(ctx context.Context) (string, error) { return usernsStep(ctx, cfg.Root) }},
		{"runsc", gvisorOnly, func(ctx context.Context) (string, error) { return tool(ctx, "runsc", cfg.RunscPath) }},
		{"gVisor sandbox", gvisorOnly, func(ctx context.Context) (string, error) { return gvisorStep(ctx, cfg.RunscPath) }},
		{"cgroups", nil, cgroups},
		{"egress network", nil, egress},
	}
}

var needed = []capability.Cap{
	capability.CAP_SYS_ADMIN, capability.CAP_NET_ADMIN, capability.CAP_SETUID, capability.CAP_SETGID, capability.CAP_CHOWN,
	capability.CAP_DAC_OVERRIDE, capability.CAP_FOWNER, capability.CAP_MKNOD, capability.CAP_SYS_CHROOT, capability.CAP_KILL,
	capability.CAP_SYS_PTRACE,
}

func privileges(context.Context) (string, error) {
	const fix = "run kiln as root, or in a pod that is given these capabilities."
	if os.Geteuid() != 0 {
		return "", problem(fix, "uid %d is not root", os.Geteuid())
	}
	caps, err := capability.NewPid2(0)
	if err == nil {
		err = caps.Load()
	}
	if err != nil {
		return "", problem(fix, "read capabilities: %w", err)
	}
	var missing []string
	for _, c := range needed {
		if !caps.Get(capability.EFFECTIVE, c) {
			missing = append(missing, c.String())
		}
	}
	if len(missing) > 0 {
		return "", problem(fix, "root without %s", strings.Join(missing, ", "))
	}
	return "root with the capabilities that are needed", nil
}

// idmapMajor.idmapMinor is the first Linux with all that the userns sandbox uses.
const (
	idmapMajor = 6
	idmapMinor = 13
)

func kernel(context.Context) (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", problem("this should not happen on Linux.", "uname: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	major, minor := releaseNumbers(release)
	if major < idmapMajor || major == idmapMajor && minor < idmapMinor {
		return "", problem("use a newer kernel, or the gvisor sandbox.", "Linux %s is older than %d.%d", release, idmapMajor, idmapMinor)
	}
	return "Linux " + release, nil
}

// releaseNumbers returns the first two numbers of a kernel release, 0 where there is
// none.
func releaseNumbers(s string) (major, minor int) {
	// What does not match leaves its number at 0.
	_, _ = fmt.Sscanf(s, "%d.%d", &major, &minor)
	return major, minor
}

// existing returns root, or its nearest parent that exists.
func existing(root string) (string, error) {
	dir, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	for {
		st, err := os.Stat(dir)
		if err == nil && !st.IsDir() {
			return "", fmt.Errorf("%s is not a directory", dir)
		}
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, fs.ErrNotExist) || dir == "/" {
			return "", err
		}
		dir = filepath.Dir(dir)
	}
}

// scratch makes a directory on the file system of root and returns it with what
// removes it.
func scratch(root string) (string, func(), error) {
	dir, err := existing(root)
	if err != nil {
		return "", nil, err
	}
	dir, err = os.MkdirTemp(dir, ".kiln-doctor-")
	if err != nil {
		return "", nil, err
	}
	return dir, func() { _ = os.RemoveAll(dir) }, nil
}

func stateDir(root string) (string, error) {
	if strings.ContainsAny(root, ":,\\\n") {
		return "", problem("choose another --root.", "%q has a colon, comma or backslash, which overlay mounts cannot use", root)
	}
	_, remove, err := scratch(root)
	if err != nil {
		return "", problem("choose a directory that can be written with --root.", "%w", err)
	}
	remove()
	if _, err := os.Stat(root); err != nil {
		return root + " will be made", nil
	}
	return root, nil
}

func freeDisk(root string) (string, error) {
	dir, err := existing(root)
	if err != nil {
		return "", problem("choose a directory that exists with --root.", "%w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", problem("choose a directory on a local disk with --root.", "statfs %s: %w", dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	detail := fmt.Sprintf("%s free below %s", units.HumanSize(float64(free)), dir)
	if free < minFree {
		return "", problem("free some space, for example with 'kiln prune'.", "only %s", detail)
	}
	return detail, nil
}

func lockHolder(root string) (string, error) {
	if holder, held := snapshot.Holder(root); held {
		return "", problem("wait for it to end, or build on it with --agent.", "in use by %s", holder)
	}
	return "free", nil
}

func tool(ctx context.Context, name, path string) (string, error) {
	if path == "" {
		return "", problem(fmt.Sprintf("put %s beside the kiln program or on the PATH, or name it with KILN_%s.", name, strings.ToUpper(name)), "%s was not found", name)
	}
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	if err != nil {
		return "", problem("install a working "+name+".", "%s --version: %w", path, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return fmt.Sprintf("%s (%s)", path, strings.TrimSpace(line)), nil
}

func cgroups(context.Context) (string, error) {
	const fix = "mount the cgroup file system; without it steps have no memory, CPU and process limits."
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", problem(fix, "read cgroups: %w", err)
	}
	var have, missing []string
	v2, _ := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	for _, c := range []string{"cpu", "memory", "pids"} {
		v1 := false
		for line := range strings.SplitSeq(string(data), "\n") {
			if f := strings.SplitN(line, ":", 3); len(f) == 3 && contains(strings.Split(f[1], ","), c) {
				_, err := os.Stat(filepath.Join("/sys/fs/cgroup", c))
				v1 = err == nil
			}
		}
		switch {
		case contains(strings.Fields(string(v2)), c):
			have = append(have, c+" (v2)")
		case v1:
			have = append(have, c+" (v1)")
		default:
			missing = append(missing, c)
		}
	}
	if len(missing) > 0 {
		return "", problem(fix, "no cgroup controller for %s", strings.Join(missing, ", "))
	}
	return strings.Join(have, ", "), nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func egress(context.Context) (string, error) {
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		return "", problem("steps can only run with --network none.", "read ip_forward: %w", err)
	}
	c, err := nftables.New()
	if err == nil {
		_, err = c.ListTables()
	}
	if err != nil {
		return "", problem("load the nf_tables kernel module and run as root; else steps can only run with --network none.", "nftables: %w", err)
	}
	if strings.TrimSpace(string(data)) != "1" {
		return "", problem("sysctl -w net.ipv4.ip_forward=1; else steps can only reach the network when kiln may set it.", "net.ipv4.ip_forward is off")
	}
	return "nftables works and ip_forward is on", nil
}
