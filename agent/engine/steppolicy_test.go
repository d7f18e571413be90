package engine

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/network"
	"github.com/moby/sys/user"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// given is what a solver says is to be mounted.
type given []mount.Mount

func (g given) Mount(context.Context, bool) (executor.MountableRef, error) {
	return givenRef(g), nil
}

type givenRef []mount.Mount

func (g givenRef) Mount() ([]mount.Mount, func() error, error) { return g, nil, nil }

func (g givenRef) IdentityMapping() *user.IdentityMapping { return nil }

func bind(dir string, options ...string) given {
	return given{{Type: "bind", Source: dir, Options: append(options, "rbind")}}
}

func overlay(lower, upper, work string) given {
	return given{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + upper, "workdir=" + work}}}
}

// solved is a step as a solver hands it over.
type solved struct {
	root   executor.Mount
	mounts []executor.Mount
	meta   executor.Meta
}

// hostileNode returns an executor, and a step that it runs.
func hostileNode(t *testing.T, rules ...policy.Rules) (*stepExecutor, string, func() solved) {
	t.Helper()
	n := openTestNode(t)
	snapshots := filepath.Join(n.cfg.Root, "store", "snapshots", "snapshots")
	dir := func(parts ...string) string {
		d := filepath.Join(append([]string{snapshots}, parts...)...)
		require.NoError(t, os.MkdirAll(d, 0o755))
		return d
	}
	busybox, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "install Debian's busybox-static")
	require.NoError(t, os.WriteFile(filepath.Join(dir("901", "fs"), "busybox"), busybox, 0o755))
	layer := overlay(dir("901", "fs"), dir("902", "fs"), dir("902", "work"))
	n.runtimes.cfg.Rules = func(Domain) StepRules { return StepRules{Rules: rules} }
	e := newStepExecutor(n.runtimes, Domain{Tenant: "a", Sandbox: sandbox.Userns})
	return e, n.cfg.Root, func() solved {
		return solved{
			root: executor.Mount{Src: layer},
			meta: executor.Meta{Args: []string{"/busybox", "true"}, Cwd: "/", NetMode: pb.NetMode_NONE},
		}
	}
}

func (s solved) run(e *stepExecutor) error {
	_, err := e.Run(context.Background(), "", s.root, s.mounts, executor.ProcessInfo{Meta: s.meta}, nil)
	return err
}

// TestHostileSolver has a solver that hands over what it never should: every step is
// checked again where it runs, and the refusal names the rule.
func TestHostileSolver(t *testing.T) {
	e, root, step := hostileNode(t)
	require.NoError(t, step().run(e), "the step that all others are made from")

	tmp := filepath.Join(root, "tmp")
	secret := filepath.Join(tmp, "buildkit-secrets1", "s")
	require.NoError(t, os.MkdirAll(filepath.Dir(secret), 0o700))
	require.NoError(t, os.WriteFile(secret, []byte("x"), 0o600))
	require.NoError(t, os.Symlink("/etc/shadow", filepath.Join(tmp, "buildkit-secrets1", "link")))
	require.NoError(t, os.Mkdir(filepath.Join(tmp, "git"), 0o700))
	own, err := net.Listen("unix", filepath.Join(root, "agent.sock"))
	require.NoError(t, err)
	defer own.Close()
	fs := filepath.Join(root, "store", "snapshots", "snapshots", "901", "fs")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "domains", "b"), 0o700))

	meta := func(change func(*executor.Meta)) func(*solved) { return func(s *solved) { change(&s.meta) } }
	mounted := func(dest string, src given) func(*solved) {
		return func(s *solved) { s.mounts = append(s.mounts, executor.Mount{Src: src, Dest: dest}) }
	}
	at := func(src given) func(*solved) { return mounted("/mnt", src) }
	rooted := func(src given) func(*solved) { return func(s *solved) { s.root = executor.Mount{Src: src} } }
	for _, c := range []struct {
		name, rule string
		hostile    func(*solved)
	}{
		{"host network", "network-mode", meta(func(m *executor.Meta) { m.NetMode = pb.NetMode_HOST })},
		{"unknown network", "network-mode", meta(func(m *executor.Meta) { m.NetMode = 7 })},
		{"negative network", "network-mode", meta(func(m *executor.Meta) { m.NetMode = -1 })},
		{"watched network", "network-mode", meta(func(m *executor.Meta) { m.Proxy = &network.ProxyConfig{} })},
		{"insecure", "security-mode", meta(func(m *executor.Meta) { m.SecurityMode = pb.SecurityMode_INSECURE })},
		{"unknown security mode", "security-mode", meta(func(m *executor.Meta) { m.SecurityMode = 2 })},
		{"device", "devices", meta(func(m *executor.Meta) { m.CDIDevices = []*pb.CDIDevice{{Name: "vendor.com/gpu=all"}} })},
		{"optional device", "devices", meta(func(m *executor.Meta) { m.CDIDevices = []*pb.CDIDevice{{Name: "vendor.com/gpu=all", Optional: true}} })},
		{"device of nothing", "devices", meta(func(m *executor.Meta) { m.CDIDevices = []*pb.CDIDevice{nil} })},
		{"cgroup", "cgroup-parent", meta(func(m *executor.Meta) { m.CgroupParent = "/" })},
		{"processors", "processors", meta(func(m *executor.Meta) { m.LinuxResources = &pb.LinuxResources{CpusetCpus: "0"} })},
		{"memory nodes", "processors", meta(func(m *executor.Meta) { m.LinuxResources = &pb.LinuxResources{CpusetMems: "0"} })},
		{"priority", "ulimits", meta(func(m *executor.Meta) { m.Ulimit = []*pb.Ulimit{{Name: "rtprio", Hard: 99}} })},
		{"unknown ulimit", "ulimits", meta(func(m *executor.Meta) { m.Ulimit = []*pb.Ulimit{{Name: "x"}} })},
		{"the node's root", "mount-source", at(bind("/"))},
		{"a file of the node", "mount-source", at(bind("/etc/shadow"))},
		{"the node's proc", "mount-source", at(bind("/proc"))},
		{"the state directory", "mount-source", at(bind(root))},
		{"content", "mount-source", at(bind(filepath.Join(root, "store", "content")))},
		{"another tenant", "mount-source", at(bind(filepath.Join(root, "domains", "b")))},
		{"all snapshots", "mount-source", at(bind(filepath.Dir(filepath.Dir(fs))))},
		{"a path that leads out", "mount-source", at(bind(fs + "/../../../../../"))},
		{"a directory in a snapshot", "mount-source", at(bind(filepath.Join(fs, "x")))},
		{"what git uses", "mount-source", at(bind(filepath.Join(tmp, "git")))},
		{"a secret that is a link", "mount-source", at(bind(filepath.Join(tmp, "buildkit-secrets1", "link")))},
		{"a socket of the node", "mount-source", at(bind(filepath.Join(root, "agent.sock")))},
		{"overlay of the node", "mount-source", at(overlay("/etc", filepath.Join(fs, "..", "fs"), filepath.Join(fs, "..", "work")))},
		{"overlay onto the node", "mount-source", at(overlay(fs, "/etc", "/tmp"))},
		{"the node as root", "mount-source", rooted(bind("/"))},
		{"the node below the root", "mount-source", rooted(overlay("/", filepath.Join(fs, "..", "fs"), filepath.Join(fs, "..", "work")))},
		{"over proc", "mount-destination", mounted("/proc/sys", bind(fs))},
		{"over devices", "mount-destination", mounted("/dev/pts", given{{Type: "tmpfs"}})},
		{"over the root", "mount-destination", mounted("/x/..", bind(fs))},
		{"too many", "mount-count", func(s *solved) {
			for range policy.MaxMounts + 1 {
				mounted("/mnt", bind(fs))(s)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := step()
			c.hostile(&s)
			err := s.run(e)
			var why refused
			require.ErrorAs(t, err, &why)
			require.Contains(t, err.Error(), "denied by rule "+c.rule+":")
		})
	}
	for _, unknown := range []given{{{Type: "nfs", Source: "host:/"}}, {}, {{Type: "bind", Source: fs}, {Type: "bind", Source: "/"}}} {
		s := step()
		at(unknown)(&s)
		require.Error(t, s.run(e), "%v", unknown)
	}
	s := step()
	at(bind(secret))(&s)
	mounted("/dev/shm", given{{Type: "tmpfs", Options: []string{"size=1m"}}})(&s)
	require.NoError(t, s.run(e), "what a step may have")
}

// TestHostileExec has a front end that starts one more process in a step.
func TestHostileExec(t *testing.T) {
	e, _, _ := hostileNode(t)
	err := e.Exec(context.Background(), "x", executor.ProcessInfo{Meta: executor.Meta{Args: []string{"/busybox"}, SecurityMode: pb.SecurityMode_INSECURE}})
	require.ErrorContains(t, err, "denied by rule security-mode:")
	err = e.Exec(context.Background(), "x", executor.ProcessInfo{Meta: executor.Meta{Args: []string{"/busybox"}, CDIDevices: []*pb.CDIDevice{{}}}})
	require.ErrorContains(t, err, "denied by rule devices:")
}

// TestPoliciesHoldForSteps has steps that a policy forbids, though nobody has refused
// their build.
func TestPoliciesHoldForSteps(t *testing.T) {
	for _, c := range []struct {
		name  string
		rules policy.Rules
		step  func(*solved)
		want  string
	}{
		{"class", policy.Rules{RequiredClass: policy.GVisor}, nil, "step.sandbox: denied by SandboxPolicy \"p\", rule sandboxClasses.required"},
		{"class that is unknown", policy.Rules{Classes: []string{"none"}}, nil, "step.sandbox: denied by SandboxPolicy \"p\", rule sandboxClasses.allowed"},
		{"network", policy.Rules{Networks: []string{policy.NetworkNone}}, func(s *solved) { s.meta.NetMode = pb.NetMode_UNSET }, "step.network: denied by SandboxPolicy \"p\", rule network.allowed"},
		{"tmpfs", policy.Rules{Mounts: []string{policy.MountSecret}}, func(s *solved) {
			s.mounts = []executor.Mount{{Src: given{{Type: "tmpfs"}}, Dest: "/t"}}
		}, "step.mounts[0]: denied by SandboxPolicy \"p\", rule mounts.allowed"},
		{"shared memory", policy.Rules{Max: policy.Limits{ShmBytes: 1 << 20}}, func(s *solved) {
			s.mounts = []executor.Mount{{Src: given{{Type: "tmpfs", Options: []string{"size=2m"}}}, Dest: "/dev/shm"}}
		}, "step.limits[kiln.build/shm]: denied by SandboxPolicy \"p\", rule maxResources.limits[kiln.build/shm]: at most 1048576 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.rules.Name = "p"
			e, _, step := hostileNode(t, policy.Rules{}, c.rules)
			s := step()
			if c.step != nil {
				c.step(&s)
			}
			require.ErrorContains(t, s.run(e), c.want)
			require.Equal(t, 1, strings.Count(s.run(e).Error(), "denied by"))
		})
	}
}
