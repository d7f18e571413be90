package escape

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// insecureRequests change a step such that it asks for what no sandbox gives.
var insecureRequests = map[string]func(*pb.ExecOp){
	"no sandbox":            func(o *pb.ExecOp) { o.Security = pb.SecurityMode_INSECURE },
	"unknown security mode": func(o *pb.ExecOp) { o.Security = 99 },
	"the node's network":    func(o *pb.ExecOp) { o.Network = pb.NetMode_HOST },
	"unknown network":       func(o *pb.ExecOp) { o.Network = 77 },
	"a device of CDI":       func(o *pb.ExecOp) { o.CdiDevices = []*pb.CDIDevice{{Name: "vendor.com/device=all"}} },
	"a cgroup":              func(o *pb.ExecOp) { o.Meta.CgroupParent = "/../../" },
	"unknown mount": func(o *pb.ExecOp) {
		o.Mounts = append(o.Mounts, &pb.Mount{Dest: "/m", MountType: 99, Input: -1, Output: -1})
	},
	"input beyond the end": func(o *pb.ExecOp) { o.Mounts = append(o.Mounts, &pb.Mount{Dest: "/m", Input: 77, Output: -1}) },
}

var _ = register(
	entry{
		ID: "escape/insecure-requests", Threat: "A client asks for a step without sandbox, with the node's network, devices or cgroups, or with values that nobody knows.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			require.Contains(t, e.MustBuild(t, build{LLB: execOf(t, nil), NoExport: true}).Log, "the step runs", "it runs when it asks for nothing")
			for name, change := range insecureRequests {
				r := e.Build(t, build{LLB: execOf(t, change), NoExport: true})
				require.Error(t, r.Err, name)
				require.NotContains(t, r.Log, "the step runs", name)
			}
		},
	},
	entry{
		ID: "escape/gateway-containers", Threat: "A front end asks for a container without sandbox, or with the node's network, or for a process with more than its container has.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			start := func(req gateway.NewContainerRequest, mode pb.SecurityMode) (string, error) {
				var out output
				err := e.gateway(t, func(ctx context.Context, c gateway.Client, root gateway.Reference) error {
					req.Mounts = []gateway.Mount{{Dest: "/", MountType: pb.MountType_BIND, Ref: root}}
					ctr, err := c.NewContainer(ctx, req)
					if err != nil {
						return err
					}
					defer ctr.Release(context.WithoutCancel(ctx))
					p, err := ctr.Start(ctx, gateway.StartRequest{Args: []string{"/bin/echo", "the step runs"}, Cwd: "/", SecurityMode: mode, Stdout: &out, Stderr: &out})
					if err != nil {
						return err
					}
					return p.Wait()
				})
				return out.String(), err
			}
			log, err := start(gateway.NewContainerRequest{}, pb.SecurityMode_SANDBOX)
			require.NoError(t, err)
			require.Contains(t, log, "the step runs")
			for _, mode := range []pb.SecurityMode{pb.SecurityMode_INSECURE, 99} {
				log, err = start(gateway.NewContainerRequest{}, mode)
				require.Error(t, err, mode)
				require.NotContains(t, log, "the step runs", mode)
			}
			for _, mode := range []pb.NetMode{pb.NetMode_HOST, 77} {
				log, err = start(gateway.NewContainerRequest{NetMode: mode}, pb.SecurityMode_SANDBOX)
				require.Error(t, err, mode)
				require.NotContains(t, log, "the step runs", mode)
			}
		},
	},
	entry{
		ID: "escape/platform-strings", Threat: "A platform, as of an emulator, has .. or a path of the node in it.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			for _, p := range []string{"linux/../../../../bin/busybox", "../..", "linux/amd64/../../..", "linux/" + e.CanaryFile, "linux/amd64\x00/x"} {
				r := e.Build(t, build{Dockerfile: "FROM tools\nRUN cat /dev/.buildkit_qemu_emulator " + e.CanaryFile + "; true\n", Attrs: map[string]string{"platform": p}})
				e.CheckNode(t, r)
				r = e.Build(t, build{Dockerfile: "FROM --platform=" + strings.ReplaceAll(p, "\x00", "") + " tools\nRUN echo the step runs\n", NoExport: true})
				e.CheckNode(t, r)
			}
		},
	},
	entry{
		ID: "escape/download-names", Threat: "A server gives what ADD fetches a name with .. or a slash.",
		Severity: escapesToNode,
		Test: func(t *testing.T, e *env) {
			dropped := "dropped-" + random(t)
			up := strings.Repeat("../", 10) + strings.TrimPrefix(e.dir(t), "/") + "/" + dropped
			for _, name := range []string{up, "/" + dropped, "..", "a/../../" + dropped, `..\..\` + dropped, "%2e%2e%2f" + dropped} {
				o := e.serveFile(t, name)
				r := e.Build(t, build{Dockerfile: "FROM scratch\nADD " + o.URL + "/%2e%2e%2f%2e%2e%2fx /in/\nADD " + o.URL + "/a/..%2f" + dropped + " /in/\n"})
				require.NoError(t, filepath.WalkDir(r.Dir, func(path string, d os.DirEntry, err error) error {
					if rel, _ := filepath.Rel(r.Dir, path); err == nil && !d.IsDir() {
						require.True(t, strings.HasPrefix(rel, "in/"), rel)
					}
					return nil
				}))
			}
			require.Empty(t, find(t, filepath.Dir(e.Root), dropped, e.temp), "it is where nobody said")
		},
		Once: "the agent fetches; no step runs",
	},
	entry{
		ID: "escape/runsc-flags", Threat: "gVisor runs with an option that weakens it, or with more of the node than it needs.",
		Severity: escapesToNode, Test: runscFlags,
		Not: map[sandbox.Class]string{sandbox.Userns: "it has no runsc"},
	},
)

// execOf is a definition with one step, that change has changed.
func execOf(t *testing.T, change func(*pb.ExecOp)) *llb.Definition {
	t.Helper()
	unique := random(t)
	def, err := llb.Scratch().File(llb.Copy(llb.Local("tools"), "/", "/")).
		Run(llb.Args([]string{"/bin/sh", "-c", "echo the step runs; : " + unique}), llb.AddEnv("PATH", "/bin")).Root().Marshal(t.Context())
	require.NoError(t, err)
	renamed := map[string]string{}
	for i, data := range def.Def {
		var op pb.Op
		require.NoError(t, op.UnmarshalVT(data))
		if exec := op.GetExec(); exec != nil && change != nil {
			change(exec)
		}
		for _, in := range op.Inputs {
			if to, ok := renamed[in.Digest]; ok {
				in.Digest = to
			}
		}
		was := digest.FromBytes(data)
		data, err := op.MarshalVT()
		require.NoError(t, err)
		def.Def[i] = data
		now := digest.FromBytes(data)
		renamed[was.String()] = now.String()
		if m, ok := def.Metadata[was]; ok {
			def.Metadata[now] = m
		}
	}
	return def
}

// find returns the paths below dir, but not below except, that have a name.
func find(t *testing.T, dir, name, except string) []string {
	t.Helper()
	var out []string
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && path == except {
			return filepath.SkipDir
		}
		if err == nil && d.Name() == name && !strings.Contains(path, "/store/") {
			out = append(out, path)
		}
		return nil
	}))
	return out
}

// runscFlags looks at the process of a sandbox that runs a step.
func runscFlags(t *testing.T, e *env) {
	e.Neighbour(t)
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	root, err := os.Stat("/")
	require.NoError(t, err)
	sandboxes := 0
	for _, p := range procs {
		data, _ := os.ReadFile(p)
		args := strings.Split(strings.TrimRight(string(data), "\x00"), "\x00")
		if !strings.Contains(string(data), "--root="+e.Root) || !contains(args, "boot") {
			continue
		}
		sandboxes++
		for _, want := range []string{"--platform=systrap", "--host-settings=ignore", "--net-raw=false", "--host-fifo=none", "--network=sandbox", "--host-uds=none"} {
			require.True(t, contains(args, want) || want == "--network=sandbox" && contains(args, "--network=none"), "%s: %q", want, args)
		}
		for _, a := range args {
			for _, bad := range []string{"--debug", "--strace", "--profile", "--rootless", "--TESTONLY", "--oci-seccomp=false", "--file-access", "--unsafe", "--nvproxy", "--tpuproxy", "--enable-raw", "--allow-packet", "--directfs=true", "--ignore-seccomp", "--iouring"} {
				name, value, _ := strings.Cut(a, "=")
				require.False(t, strings.HasPrefix(name, bad) && value != "false" || name == "--network" && value == "host" || name == "--host-uds" && value != "none", "%s", a)
			}
		}
		dir := filepath.Dir(p)
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		require.NoError(t, err)
		require.Contains(t, string(status), "\nSeccomp:\t2\n", "it has a filter of its own")
		require.Contains(t, string(status), "\nNoNewPrivs:\t1\n")
		for _, ns := range []string{"user", "mnt", "pid", "net", "ipc", "uts"} {
			of, err := os.Readlink(filepath.Join(dir, "ns", ns))
			require.NoError(t, err)
			own, err := os.Readlink("/proc/self/ns/" + ns)
			require.NoError(t, err)
			require.NotEqual(t, own, of, "the namespace %s is the node's", ns)
		}
		names, err := os.ReadDir(filepath.Join(dir, "root"))
		require.NoError(t, err)
		for _, n := range names {
			require.Contains(t, []string{"proc", "etc", "dev", "sys", "tmp"}, n.Name(), "its root has nothing of the node")
		}
		_, err = os.Stat(filepath.Join(dir, "root", e.CanaryFile))
		require.Error(t, err)
		open, err := os.ReadDir(filepath.Join(dir, "fd"))
		require.NoError(t, err)
		for _, fd := range open {
			to, _ := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
			require.NotContains(t, to, filepath.Dir(e.CanaryFile), "descriptor %s", fd.Name())
			of, err := os.Stat(filepath.Join(dir, "fd", fd.Name()))
			require.False(t, err == nil && os.SameFile(root, of), "descriptor %s is the node's root: %q", fd.Name(), args)
		}
	}
	require.NotZero(t, sandboxes, "no process of runsc is found")
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}
