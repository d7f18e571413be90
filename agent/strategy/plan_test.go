package strategy

import (
	"context"
	"testing"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func newPlan(t *testing.T, in Inputs) *Plan {
	t.Helper()
	plan, err := New(context.Background(), in)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, plan.Close()) })
	return plan
}

func TestPlanOfADockerfile(t *testing.T) {
	spec := &agentv1.BuildSpec{
		Source: &agentv1.Source{
			From:          &agentv1.Source_Git{Git: &agentv1.GitSource{Url: "https://example.com/a", Revision: "main"}},
			NamedContexts: map[string]string{"docker.io/library/base:latest": "docker-image://x"},
		},
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{
			Path: "./a//b", Target: "t", BuildArgs: map[string]string{"A": "1"}, Labels: map[string]string{"l": "2"},
			ExtraHosts: map[string]string{"h": "::1", "g": "192.0.2.1"},
		}},
		Network: agentv1.NetworkMode_NETWORK_MODE_NONE, Platforms: []string{"linux/amd64", "linux/aarch64"},
		NoCache: true, Pull: true, SourceDateEpoch: 5,
		Attestations: map[string]string{"provenance": "mode=max,type=provenance", "sbom": "false"},
	}
	plan := newPlan(t, Inputs{Spec: spec})
	require.Equal(t, map[string]string{
		"filename": "a/b", "target": "t", "build-arg:A": "1", "build-arg:SOURCE_DATE_EPOCH": "5", "label:l": "2",
		"add-hosts": "g=192.0.2.1,h=::1", "platform": "linux/amd64,linux/arm64", "context:base": "docker-image://x",
		"no-cache": "", "image-resolve-mode": "pull", "force-network-mode": "none", "attest:provenance": "mode=max",
		"input:context": "https://example.com/a#main",
	}, plan.Opt.FrontendAttrs)
	require.Empty(t, plan.Opt.LocalMounts)
	require.Empty(t, plan.Opt.Exports)
	require.Empty(t, plan.Opt.AllowedEntitlements)

	plan = newPlan(t, Inputs{Spec: &agentv1.BuildSpec{Strategy: inlineDockerfile("FROM scratch")}})
	require.Equal(t, map[string]string{"filename": "Dockerfile", "dockerfilekey": "dockerfile"}, plan.Opt.FrontendAttrs)
	require.Len(t, plan.Opt.LocalMounts, 2)
}

func TestPlanOfOutputsAndCaches(t *testing.T) {
	registry := func(r *agentv1.RegistryOutput) *agentv1.Output {
		return &agentv1.Output{To: &agentv1.Output_Registry{Registry: r}}
	}
	spec := dockerfileSpec()
	spec.Outputs = []*agentv1.Output{
		registry(&agentv1.RegistryOutput{Image: "example.com/a"}),
		{To: &agentv1.Output_Node{Node: &agentv1.NodeOutput{Image: "example.com/a:1"}}},
		registry(&agentv1.RegistryOutput{Image: "example.com/b:2", Compression: "zstd", ForceCompression: true, Annotations: map[string]string{"k": "v"}}),
		registry(&agentv1.RegistryOutput{Image: "other.example.com/a:3"}),
		registry(&agentv1.RegistryOutput{Image: "plain.example.com/a:3", Insecure: true}),
	}
	spec.CacheFrom = []*agentv1.CacheRef{{Type: "registry", Attributes: map[string]string{"ref": "a/cache"}}}
	spec.CacheTo = []*agentv1.CacheRef{{Type: "inline"}, {Type: "registry", Attributes: map[string]string{"ref": "a/cache:1"}}}
	plan := newPlan(t, Inputs{Spec: spec})
	push := func(name string, more map[string]string) client.ExportEntry {
		attrs := map[string]string{"name": name, "push": "true", "unpack": "false", "store": "false"}
		for k, v := range more {
			attrs[k] = v
		}
		return client.ExportEntry{Type: "image", Attrs: attrs}
	}
	require.Equal(t, []client.ExportEntry{
		push("plain.example.com/a:3", map[string]string{"registry.insecure": "true"}),
		push("example.com/b:2", map[string]string{"compression": "zstd", "force-compression": "true", "oci-mediatypes": "true", "annotation.k": "v"}),
		{Type: "image", Attrs: map[string]string{"name": "example.com/a:1", "push": "false", "unpack": "false", "store": "true"}},
		push("example.com/a:latest,other.example.com/a:3", nil),
	}, plan.Opt.Exports)
	require.Equal(t, []string{
		"example.com/a:latest", "example.com/a:1", "example.com/b:2", "other.example.com/a:3", "plain.example.com/a:3",
	}, plan.Images)
	require.Equal(t, []client.CacheOptionsEntry{{Type: "registry", Attrs: map[string]string{"ref": "docker.io/a/cache:latest"}}}, plan.Opt.CacheImports)
	require.Equal(t, []client.CacheOptionsEntry{
		{Type: "inline", Attrs: map[string]string{}}, {Type: "registry", Attrs: map[string]string{"ref": "docker.io/a/cache:1", "mode": "min"}},
	}, plan.Opt.CacheExports)
	require.NotContains(t, spec.CacheTo[1].Attributes, "mode", "the spec is left as it is")
}

// gitOp returns the operation that fetches a plan's repository.
func gitOp(t *testing.T, src *agentv1.Source, creds *agentv1.Credentials) (*pb.SourceOp, *planner) {
	t.Helper()
	p := &planner{in: Inputs{Credentials: creds}, spec: &agentv1.BuildSpec{Source: src}, loan: newLoan(nil, nil)}
	s, err := p.newSource()
	require.NoError(t, err)
	def, err := s.git.Marshal(context.Background())
	require.NoError(t, err)
	var op pb.Op
	require.NoError(t, op.UnmarshalVT(def.Def[0]))
	return op.GetSource(), p
}

func TestPlanOfGitSources(t *testing.T) {
	src := gitSource("https://example.com/a/b", "v1")
	src.ContextDir = "sub/dir"
	op, p := gitOp(t, src, nil)
	require.Equal(t, "git://example.com/a/b#v1:sub/dir", op.Identifier)
	require.Equal(t, map[string]string{pb.AttrFullRemoteURL: "https://example.com/a/b"}, op.Attrs)
	require.Empty(t, p.loan.Secrets)

	src.GetGit().Credential = "x"
	creds := &agentv1.Credentials{Git: map[string]*agentv1.GitCredential{"x": {Password: "hunter2"}}}
	op, p = gitOp(t, src, creds)
	id := op.Attrs[pb.AttrAuthHeaderSecret]
	require.Equal(t, "basic eC1hY2Nlc3MtdG9rZW46aHVudGVyMg==", string(p.loan.Secrets[id]))
	require.Len(t, p.loan.Secrets, 1)
	require.NotContains(t, op.String(), "hunter2")
	other, _ := gitOp(t, src, creds)
	require.NotEqual(t, id, other.Attrs[pb.AttrAuthHeaderSecret], "the name cannot be guessed")

	src = gitSource("git@example.com:a/b.git", "")
	src.GetGit().Credential = "x"
	creds.Git["x"] = &agentv1.GitCredential{SshPrivateKey: []byte("key"), SshKnownHosts: []byte("example.com ssh-ed25519 AAAA\n")}
	op, p = gitOp(t, src, creds)
	require.Equal(t, "git@example.com:a/b.git", op.Attrs[pb.AttrFullRemoteURL])
	require.Equal(t, "example.com ssh-ed25519 AAAA\n", op.Attrs[pb.AttrKnownSSHHosts])
	require.Equal(t, "key", string(p.loan.SSHKeys[op.Attrs[pb.AttrMountSSHSock]]))
	require.NotContains(t, op.Attrs[pb.AttrMountSSHSock], "default")
}

func TestArgumentsOfAStep(t *testing.T) {
	image := &stepImage{}
	image.config.Config.Entrypoint, image.config.Config.Cmd = []string{"entry"}, []string{"cmd"}
	for _, x := range []struct{ command, args, want []string }{
		{nil, nil, []string{"entry", "cmd"}},
		{nil, []string{"a"}, []string{"entry", "a"}},
		{[]string{"c"}, nil, []string{"c"}},
		{[]string{"c"}, []string{"a"}, []string{"c", "a"}},
	} {
		require.Equal(t, x.want, arguments(&agentv1.BuilderStep{Command: x.command, Args: x.args}, image.config.Config))
	}
}

func TestTitlesAreOneShortLine(t *testing.T) {
	require.Equal(t, "[a] sh -c x  y", stepTitle("a", []string{"sh", "-c", "x\n\x1by"}))
	long := make([]string, 200)
	require.LessOrEqual(t, len(stepTitle("a", append(long, "é"))), maxTitle+len("[a] …"))
}

// TestStepIsOneOperation looks at the definition of a step.
func TestStepIsOneOperation(t *testing.T) {
	step := &agentv1.BuilderStep{
		Secrets: []*agentv1.StepSecret{{Id: "a"}, {Id: "a", Env: "A"}, {Id: "b", Path: "/x/", Env: "B"}},
		Caches:  []*agentv1.StepCache{{Id: "go", Path: "/go/"}},
	}
	for _, root := range []bool{true, false} {
		opts := append(stepSecrets(step, root), stepCaches(step, root)...)
		def, err := llb.Scratch().Run(append(opts, llb.Args([]string{"x"}), llb.Dir("/"))...).Root().Marshal(context.Background())
		require.NoError(t, err)
		var exec *pb.ExecOp
		for _, data := range def.Def {
			var op pb.Op
			require.NoError(t, op.UnmarshalVT(data))
			if e := op.GetExec(); e != nil {
				exec = e
			}
		}
		mounts := map[string]*pb.Mount{}
		for _, m := range exec.Mounts {
			mounts[m.Dest] = m
		}
		mode := uint32(0o444)
		if root {
			mode = 0o400
		}
		require.Equal(t, mode, mounts["/run/secrets/a"].SecretOpt.Mode)
		require.Equal(t, "b", mounts["/x"].SecretOpt.ID)
		require.False(t, mounts["/x"].SecretOpt.Optional)
		require.Equal(t, "/go", mounts["/go"].CacheOpt.ID)
		require.Equal(t, pb.CacheSharingOpt_SHARED, mounts["/go"].CacheOpt.Sharing)
		require.Equal(t, !root, mounts["/go"].Selector == "/cache")
		require.Len(t, exec.Secretenv, 2)
		require.Equal(t, []string{"a", "A", "b", "B"}, []string{exec.Secretenv[0].ID, exec.Secretenv[0].Name, exec.Secretenv[1].ID, exec.Secretenv[1].Name})
	}
}

func TestStepsRunOnTheNodesPlatform(t *testing.T) {
	spec := fullSteps()
	creds := &agentv1.Credentials{Secrets: map[string][]byte{"token": nil}}
	spec.Platforms = []string{"linux/arm64"}
	_, err := New(t.Context(), Inputs{Spec: spec, Credentials: creds, Platform: "linux/amd64"})
	require.EqualError(t, err, "spec.platforms[0]: steps run on the node, which is linux/amd64")
	newPlan(t, Inputs{Spec: spec, Credentials: creds, Platform: "linux/arm64"})
}

func TestCheckCredentials(t *testing.T) {
	_, key := sshKey(t)
	known := []byte("# comment\nexample.com ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl\n")
	git := func(url string, c *agentv1.GitCredential) (*agentv1.BuildSpec, *agentv1.Credentials) {
		s := dockerfileSpec()
		s.Source = gitSource(url, "")
		s.Source.GetGit().Credential = "x"
		creds := &agentv1.Credentials{Git: map[string]*agentv1.GitCredential{}}
		if c != nil {
			creds.Git["x"] = c
		}
		return s, creds
	}
	const https, ssh = "https://example.com/a", "ssh://git@example.com/a"
	for _, x := range []struct {
		name, url string
		git       *agentv1.GitCredential
		field     string
	}{
		{"https", https, &agentv1.GitCredential{Password: "p"}, ""},
		{"ssh", ssh, &agentv1.GitCredential{SshPrivateKey: key, SshKnownHosts: known}, ""},
		{"none", https, nil, `credentials.git["x"]`},
		{"https without password", https, &agentv1.GitCredential{SshPrivateKey: key}, `credentials.git["x"].password`},
		{"user with colon", https, &agentv1.GitCredential{Username: "a:b", Password: "p"}, `credentials.git["x"].username`},
		{"ssh without key", ssh, &agentv1.GitCredential{SshKnownHosts: known}, `credentials.git["x"].ssh_private_key`},
		{"ssh with another key", ssh, &agentv1.GitCredential{SshPrivateKey: []byte("hunter2"), SshKnownHosts: known}, `credentials.git["x"].ssh_private_key`},
		{"ssh without hosts", ssh, &agentv1.GitCredential{SshPrivateKey: key, SshKnownHosts: []byte("# none\n")}, `credentials.git["x"].ssh_known_hosts`},
		{"ssh with broken hosts", ssh, &agentv1.GitCredential{SshPrivateKey: key, SshKnownHosts: []byte("hunter2")}, `credentials.git["x"].ssh_known_hosts`},
	} {
		t.Run(x.name, func(t *testing.T) {
			spec, creds := git(x.url, x.git)
			err := CheckCredentials(spec, creds)
			if x.field == "" {
				require.NoError(t, err)
				newPlan(t, Inputs{Spec: spec, Credentials: creds})
				return
			}
			require.Len(t, Fields(err), 1)
			require.Equal(t, x.field, Fields(err)[0].Field)
			require.NotContains(t, err.Error(), "hunter2")
		})
	}
	spec := fullSteps()
	require.Equal(t, `credentials.secrets["token"]`, Fields(CheckCredentials(spec, nil))[0].Field)
	require.Equal(t, `credentials.secrets["token"]`, Fields(CheckCredentials(spec, &agentv1.Credentials{Secrets: map[string][]byte{"token": make([]byte, maxSecretValue+1)}}))[0].Field)
	for host, c := range map[string]*agentv1.RegistryCredential{"https://x/": {IdentityToken: "t"}, "": {}, "a": {Username: "u"}, "b": {Password: "p"}} {
		err := CheckCredentials(dockerfileSpec(), &agentv1.Credentials{Registries: map[string]*agentv1.RegistryCredential{host: c}})
		require.Equal(t, entry("credentials.registries", host), Fields(err)[0].Field)
	}
}
