package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/gvisor"
	"github.com/kiln-build/kiln/sandbox/userns"
)

// overlay mounts an overlay on the file system of root.
func overlay(root string) (_ string, err error) {
	const fix = "put the state directory on ext4 or xfs with --root; an overlay cannot lie on another overlay or on NFS."
	dir, remove, err := scratch(root)
	if err != nil {
		return "", problem(fix, "%w", err)
	}
	defer remove()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return "", problem(fix, "%w", err)
		}
	}
	opts := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
	merged := filepath.Join(dir, "merged")
	if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		return "", problem(fix, "mount overlay: %w", err)
	}
	defer func() {
		if uerr := unix.Unmount(merged, unix.MNT_DETACH); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unmount overlay: %w", uerr))
		}
	}()
	if err := os.WriteFile(filepath.Join(merged, "file"), nil, 0o600); err != nil {
		return "", problem(fix, "write to overlay: %w", err)
	}
	return "overlay mounts work below " + filepath.Dir(dir), nil
}

// idRange is a range of IDs that the probes map to.
const (
	idBase = 231072
	idSize = 65536
)

// inUserNamespace runs fn while a process holds a new user namespace; ns is open
// for as long.
func inUserNamespace(fn func(ns *os.File) error) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: idBase, Size: idSize}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: idBase, Size: idSize}},
		// The child stops at its exec and never runs a line of its program.
		Ptrace: true, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	return fn(ns)
}

func userNamespaces(context.Context) (string, error) {
	if err := locked(func() error { return inUserNamespace(func(*os.File) error { return nil }) }); err != nil {
		return "", problem("sysctl -w user.max_user_namespaces=15000, and allow user namespaces in the security module.", "make user namespace: %w", err)
	}
	return fmt.Sprintf("IDs %d to %d can be mapped", idBase, idBase+idSize-1), nil
}

func idmapped(root string) (string, error) {
	const fix = "put the state directory on ext4, xfs or btrfs with --root, and use Linux 5.19 or newer."
	dir, remove, err := scratch(root)
	if err != nil {
		return "", problem(fix, "%w", err)
	}
	defer remove()
	err = locked(func() error {
		return inUserNamespace(func(ns *os.File) error {
			tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
			if err != nil {
				return fmt.Errorf("open_tree: %w", err)
			}
			defer unix.Close(tree)
			attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
			if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
				return fmt.Errorf("mount_setattr: %w", err)
			}
			return nil
		})
	})
	if err != nil {
		return "", problem(fix, "idmapped mount: %w", err)
	}
	return "work below " + filepath.Dir(dir), nil
}

// unavailable turns what a runtime lacks into a problem.
func unavailable(err error) error {
	var ua *sandbox.UnavailableError
	if !errors.As(err, &ua) {
		return err
	}
	cause := "missing " + ua.Missing
	if ua.Err != nil {
		return problem(ua.Fix, "%s: %w", cause, ua.Err)
	}
	return problem(ua.Fix, "%s", cause)
}

// usernsSteps asks the userns runtime itself.
func usernsSteps(ctx context.Context, cfg Config) (string, error) {
	dir, remove, err := scratch(cfg.Root)
	if err != nil {
		return "", problem("choose a directory that can be written with --root.", "%w", err)
	}
	defer remove()
	if err := userns.Check(ctx, userns.Config{RuncPath: cfg.RuncPath, StateDir: dir}); err != nil {
		return "", unavailable(err)
	}
	return "overlays of idmapped mounts work", nil
}

// systrap runs a program in gVisor.
func systrap(ctx context.Context, runsc string) (_ string, err error) {
	const fix = "gVisor's systrap platform needs seccomp and ptrace: run as root, and unconfined by seccomp and AppArmor; or use the userns sandbox."
	if runsc == "" {
		return "", problem("install runsc first.", "there is no runsc")
	}
	if err := gvisor.Check(ctx, gvisor.Config{RunscPath: runsc}); err != nil {
		return "", unavailable(err)
	}
	dir, err := os.MkdirTemp("", "kiln-doctor-")
	if err != nil {
		return "", problem("make the temporary directory writable.", "%w", err)
	}
	defer os.RemoveAll(dir)
	// The sandboxed program is runsc itself, which is static and prints its version.
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(rootfs, 0o755); err != nil {
		return "", problem("make the temporary directory writable.", "%w", err)
	}
	if runsc, err = filepath.EvalSymlinks(runsc); err != nil {
		return "", problem("install runsc first.", "%w", err)
	}
	spec := specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: rootfs, Readonly: true},
		Process: &specs.Process{Args: []string{"/runsc", "--version"}, Cwd: "/", Env: []string{"PATH=/"}, NoNewPrivileges: true},
		Mounts:  []specs.Mount{{Destination: "/runsc", Source: runsc, Type: "bind", Options: []string{"bind", "ro"}}},
		Linux:   &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}}},
	}
	if err := os.WriteFile(filepath.Join(rootfs, "runsc"), nil, 0o755); err != nil {
		return "", problem("make the temporary directory writable.", "%w", err)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return "", fmt.Errorf("encode spec: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		return "", problem("make the temporary directory writable.", "%w", err)
	}
	state := filepath.Join(dir, "state")
	// runsc keeps an empty network namespace mounted for all sandboxes of a root.
	defer func() { _ = unix.Unmount(filepath.Join(state, "null-netns"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) }()
	id := "kiln-doctor"
	flags := []string{"--root", state, "--platform", "systrap", "--network", "none", "--ignore-cgroups", "--overlay2=none"}
	out, err := exec.CommandContext(ctx, runsc, append(flags, "run", "--bundle", dir, id)...).CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			// A killed run leaves its sandbox; delete ends that.
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkTimeout)
			defer cancel()
			_ = exec.CommandContext(clean, runsc, append(flags, "delete", "--force", id)...).Run()
		}
		return "", problem(fix, "run a program in gVisor: %w: %s", err, lastLine(string(out)))
	}
	return "a program ran in gVisor", nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// locked runs fn on one OS thread: a traced child belongs to the thread that
// started it, and dies with it.
func locked(fn func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return fn()
}
