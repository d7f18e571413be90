package strategy

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const aDigest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func inlineFiles(paths ...string) *agentv1.Source {
	src := &agentv1.InlineSource{}
	for _, p := range paths {
		src.Files = append(src.Files, &agentv1.InlineFile{Path: p})
	}
	return &agentv1.Source{From: &agentv1.Source_Inline{Inline: src}}
}

func httpSource(url, digest string) *agentv1.Source {
	return &agentv1.Source{From: &agentv1.Source_Http{Http: &agentv1.HTTPSource{Url: url, Digest: digest}}}
}

func dockerfileSpec() *agentv1.BuildSpec {
	return &agentv1.BuildSpec{Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}}}
}

func fullSteps() *agentv1.BuildSpec {
	s := stepsSpec(nil, &agentv1.StepsImage{Copies: []*agentv1.WorkspaceCopy{{Source: "out", Destination: "/"}}},
		&agentv1.BuilderStep{Name: "build", Image: "golang:1.26", Secrets: []*agentv1.StepSecret{{Id: "token"}}, Caches: []*agentv1.StepCache{{Id: "go", Path: "/go/pkg"}}})
	s.Secrets = []*agentv1.SecretRef{{Id: "token"}}
	return s
}

// TestValidateAccepts has specs with nothing wrong.
func TestValidateAccepts(t *testing.T) {
	git := func(url, revision, credential string) *agentv1.BuildSpec {
		s := dockerfileSpec()
		s.Source = gitSource(url, revision)
		s.Source.GetGit().Credential = credential
		return s
	}
	with := func(s *agentv1.BuildSpec, change func(*agentv1.BuildSpec)) *agentv1.BuildSpec {
		change(s)
		return s
	}
	for name, spec := range map[string]*agentv1.BuildSpec{
		"the least":       dockerfileSpec(),
		"steps":           fullSteps(),
		"git":             git("https://github.com/org/repo", "", ""),
		"git with .git":   git("https://git.example.com:8443/a/b.git", "refs/tags/v1.2.3", "forge"),
		"git over ssh":    git("ssh://git@example.com:22/a/b.git", "feature/ünï-code", "key"),
		"scp-like":        git("git@github.com:org/repo.git", "deadbeef", "key"),
		"git on loopback": git("http://127.0.0.1:3000/a", "", ""),
		"git on [::1]":    git("http://[::1]:3000/a", "", ""),
		"http":            with(dockerfileSpec(), func(s *agentv1.BuildSpec) { s.Source = httpSource("https://example.com/a.tgz", "") }),
		"http, checked":   with(dockerfileSpec(), func(s *agentv1.BuildSpec) { s.Source = httpSource("http://example.com/a.tgz", aDigest) }),
		"inline":          with(dockerfileSpec(), func(s *agentv1.BuildSpec) { s.Source = inlineFiles("a", "b/c", "b/d", "./e//f", "...") }),
		"named contexts": with(dockerfileSpec(), func(s *agentv1.BuildSpec) {
			s.Source = &agentv1.Source{NamedContexts: map[string]string{"base": "docker-image://alpine", "x": "https://h/x.git#main:dir", "s": "docker-image://scratch"}}
		}),
		"everything of a Dockerfile": with(dockerfileSpec(), func(s *agentv1.BuildSpec) {
			s.Strategy = &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{
				Path: "build/Dockerfile", Target: "1", BuildArgs: map[string]string{"HTTP_PROXY": "x", "http.x": ""}, Labels: map[string]string{"a b": "c"},
				ExtraHosts: map[string]string{"a.b": "::1", "c": "192.0.2.1"},
			}}
			s.Platforms = []string{"linux/amd64", "linux/arm64/v8", "linux/arm/v7"}
			s.Attestations = map[string]string{"provenance": "mode=max", "sbom": "generator=a/b:1,scan-x=y"}
			s.Sandbox, s.Network = agentv1.SandboxClass_SANDBOX_CLASS_USERNS, agentv1.NetworkMode_NETWORK_MODE_EGRESS
			s.Resources = &agentv1.Resources{CpuMillis: 1, MemoryBytes: math.MaxInt64}
			s.Timeout = durationpb.New(time.Hour)
			s.Outputs = []*agentv1.Output{
				{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: "a/b", Compression: "zstd", Annotations: map[string]string{"org.x": "y"}}}},
				{To: &agentv1.Output_Node{Node: &agentv1.NodeOutput{Image: "a/b"}}},
			}
			s.CacheFrom = []*agentv1.CacheRef{{Type: "registry", Attributes: map[string]string{"ref": "a/cache"}}}
			s.CacheTo = []*agentv1.CacheRef{{Type: "inline"}, {Type: "registry", Attributes: map[string]string{"ref": "a/cache", "mode": "max", "oci-mediatypes": "true", "compression-level": "3"}}}
		}),
	} {
		t.Run(name, func(t *testing.T) { require.NoError(t, Validate(spec)) })
	}
}

// refusal is a spec and what is wrong with it.
type refusal struct {
	change  func(*agentv1.BuildSpec)
	field   string
	message string
}

func checkRefusals(t *testing.T, base func() *agentv1.BuildSpec, cases map[string]refusal) {
	t.Helper()
	for name, x := range cases {
		t.Run(name, func(t *testing.T) {
			spec := base()
			x.change(spec)
			err := Validate(spec)
			require.Error(t, err)
			fields := Fields(err)
			require.Len(t, fields, 1, err)
			require.Equal(t, x.field, fields[0].Field)
			require.Contains(t, fields[0].Message, x.message)
			require.Less(t, len(err.Error()), 500)
			_, err = New(t.Context(), Inputs{Spec: spec})
			require.Equal(t, fields, Fields(err))
		})
	}
}

func TestValidateRefusesSources(t *testing.T) {
	source := func(s *agentv1.Source) func(*agentv1.BuildSpec) {
		return func(spec *agentv1.BuildSpec) { spec.Source = s }
	}
	git := func(url string) func(*agentv1.BuildSpec) { return source(gitSource(url, "")) }
	revision := func(r string) func(*agentv1.BuildSpec) { return source(gitSource("https://example.com/a", r)) }
	image := func(image, from, to string) func(*agentv1.BuildSpec) {
		return source(&agentv1.Source{Images: []*agentv1.ImageSource{{Image: image, Paths: []*agentv1.ImagePath{{SourcePath: from, DestinationDir: to}}}}})
	}
	named := func(name, value string) func(*agentv1.BuildSpec) {
		return source(&agentv1.Source{NamedContexts: map[string]string{name: value}})
	}
	large := inlineFiles("a", "b")
	large.GetInline().Files[1].Content = make([]byte, maxInline)
	mode := inlineFiles("a")
	mode.GetInline().Files[0].Mode = 0o4755
	many := make([]string, maxInlineFiles+1)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	const gitURL, files = "spec.source.git.url", "spec.source.inline.files"
	checkRefusals(t, dockerfileSpec, map[string]refusal{
		"git: empty":                {git(""), gitURL, "is not a git URL"},
		"git: file":                 {git("file:///etc"), gitURL, "is not a git URL"},
		"git: path":                 {git("/etc"), gitURL, "is not a git URL"},
		"git: remote helper":        {git("ext::sh -c touch% /tmp/x"), gitURL, "space"},
		"git: remote helper, tight": {git("ext::sh"), gitURL, "is not a git URL"},
		"git: git protocol":         {git("git://example.com/a"), gitURL, "scheme"},
		"git: option":               {git("--upload-pack=x"), gitURL, "is not a git URL"},
		"git: option as host":       {git("ssh://-oProxyCommand=x/a"), gitURL, "dash"},
		"git: option as host, user": {git("ssh://a@-oProxyCommand=x/a"), gitURL, "dash"},
		"git: plain HTTP":           {git("http://example.com/a"), gitURL, "loopback"},
		"git: almost loopback":      {git("http://127.0.0.1.example.com/a"), gitURL, "loopback"},
		"git: user":                 {git("https://user@example.com/a"), gitURL, "credentials"},
		"git: password":             {git("https://user:hunter2@example.com/a"), gitURL, "credentials"},
		"git: ssh password":         {git("ssh://user:hunter2@example.com/a"), gitURL, "password"},
		"git: fragment":             {git("https://example.com/a#main"), gitURL, "fragment"},
		"git: query":                {git("https://example.com/a?ref=x"), gitURL, "query"},
		"git: line break":           {git("https://example.com/a\nb"), gitURL, "control"},
		"git: no path":              {git("https://example.com/"), gitURL, "is not a git URL"},
		"git: ssh without key":      {git("ssh://git@example.com/a"), "spec.source.git.credential", "is missing"},
		"git: scp without key":      {git("git@example.com:a"), "spec.source.git.credential", "is missing"},
		"revision: option":          {revision("-x"), "spec.source.git.revision", "is not the name"},
		"revision: directory":       {revision("main:sub"), "spec.source.git.revision", "is not the name"},
		"revision: range":           {revision("a..b"), "spec.source.git.revision", "is not the name"},
		"revision: fragment":        {revision("a#b"), "spec.source.git.revision", "is not the name"},
		"revision: escape":          {revision("a%2fb"), "spec.source.git.revision", "is not the name"},
		"revision: space":           {revision("a b"), "spec.source.git.revision", "is not the name"},
		"revision: reflog":          {revision("main@{1}"), "spec.source.git.revision", "is not the name"},
		"revision: zero byte":       {revision("a\x00b"), "spec.source.git.revision", "is not the name"},
		"http: no scheme":           {source(httpSource("example.com/a", "")), "spec.source.http.url", "is not an HTTP URL"},
		"http: file":                {source(httpSource("file:///etc/passwd", "")), "spec.source.http.url", "is not an HTTP URL"},
		"http: plain":               {source(httpSource("http://example.com/a", "")), "spec.source.http.url", "digest"},
		"http: password":            {source(httpSource("https://u:hunter2@example.com/a", "")), "spec.source.http.url", "credentials"},
		"http: session":             {source(httpSource("http://buildkit-session/x", aDigest)), "spec.source.http.url", "reserved"},
		"http: session, port":       {source(httpSource("https://buildkit-session:1/x", "")), "spec.source.http.url", "reserved"},
		"http: digest":              {source(httpSource("https://example.com/a", "sha256:1")), "spec.source.http.digest", "is not a digest"},
		"http: weak digest":         {source(httpSource("https://example.com/a", "md5:"+strings.Repeat("0", 32))), "spec.source.http.digest", "is not a digest"},
		"upload: no digest":         {source(&agentv1.Source{From: &agentv1.Source_Upload{}}), "spec.source.upload.digest", "is not a digest"},
		"upload: path":              {source(&agentv1.Source{From: &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: "sha256:../../x"}}}), "spec.source.upload.digest", "is not a digest"},
		"inline: absolute":          {source(inlineFiles("/etc/passwd")), files + "[0].path", "absolute"},
		"inline: up":                {source(inlineFiles("a", "x/../../y")), files + "[1].path", "leads out"},
		"inline: up and down":       {source(inlineFiles("x/../y")), files + "[0].path", "leads out"},
		"inline: empty":             {source(inlineFiles("")), files + "[0].path", "is not the name of a file"},
		"inline: directory":         {source(inlineFiles("a/")), files + "[0].path", "is not the name of a file"},
		"inline: zero byte":         {source(inlineFiles("a\x00")), files + "[0].path", "zero byte"},
		"inline: long name":         {source(inlineFiles(strings.Repeat("x", 256))), files + "[0].path", "255"},
		"inline: long path":         {source(inlineFiles(strings.Repeat("x/", 2000))), files + "[0].path", "3072"},
		"inline: twice":             {source(inlineFiles("a/b", "a//./b")), files + "[1].path", "twice"},
		"inline: file and dir":      {source(inlineFiles("a/b/c", "a")), files, `"a" is both`},
		"inline: too large":         {source(large), files, "at most 1048576"},
		"inline: setuid":            {source(mode), files + "[0].mode", "04755"},
		"inline: too many":          {source(inlineFiles(many...)), files, "at most 4096"},
		"image: name":               {image("UPPER", "/a", ""), "spec.source.images[0].image", "is not an image name"},
		"image: relative":           {image("a", "a", ""), "spec.source.images[0].paths[0].source_path", "is not an absolute path"},
		"image: up":                 {image("a", "/a/../..", ""), "spec.source.images[0].paths[0].source_path", "leads out"},
		"image: to absolute":        {image("a", "/a", "/etc"), "spec.source.images[0].paths[0].destination_dir", "absolute"},
		"image: to up":              {image("a", "/a", "../x"), "spec.source.images[0].paths[0].destination_dir", "leads out"},
		"image: no paths":           {source(&agentv1.Source{Images: []*agentv1.ImageSource{{Image: "a"}}}), "spec.source.images[0].paths", "is empty"},
		"context dir: absolute":     {source(&agentv1.Source{ContextDir: "/"}), "spec.source.context_dir", "absolute"},
		"context dir: up":           {source(&agentv1.Source{ContextDir: "a/.."}), "spec.source.context_dir", "leads out"},
		"named: reserved":           {named("context", "docker-image://a"), `spec.source.named_contexts["context"]`, "is not a name"},
		"named: local":              {named("x", "local:context"), `spec.source.named_contexts["x"]`, "is not an HTTP URL"},
		"named: input":              {named("x", "input:y"), `spec.source.named_contexts["x"]`, "is not an HTTP URL"},
		"named: layout":             {named("x", "oci-layout://y@"+aDigest), `spec.source.named_contexts["x"]`, "is not an HTTP URL"},
		"named: ssh":                {named("x", "ssh://git@example.com/a.git"), `spec.source.named_contexts["x"]`, "is not an HTTP URL"},
		"named: plain HTTP":         {named("x", "http://example.com/a.git"), `spec.source.named_contexts["x"]`, "https"},
		"named: image":              {named("x", "docker-image://A B"), `spec.source.named_contexts["x"]`, "is not an image name"},
		"named: twice": {source(&agentv1.Source{NamedContexts: map[string]string{"a": "docker-image://a", "a:latest": "docker-image://a"}}),
			`spec.source.named_contexts["a:latest"]`, "twice"},
	})
}

func TestValidateRefusesDockerfiles(t *testing.T) {
	d := func(change func(*agentv1.DockerfileStrategy)) func(*agentv1.BuildSpec) {
		return func(s *agentv1.BuildSpec) { change(s.GetDockerfile()) }
	}
	arg := func(k, v string) func(*agentv1.BuildSpec) {
		return d(func(s *agentv1.DockerfileStrategy) { s.BuildArgs = map[string]string{k: v} })
	}
	host := func(k, v string) func(*agentv1.BuildSpec) {
		return d(func(s *agentv1.DockerfileStrategy) { s.ExtraHosts = map[string]string{k: v} })
	}
	many := map[string]string{}
	for i := range maxBuildArgs + 1 {
		many[fmt.Sprintf("A%d", i)] = ""
	}
	checkRefusals(t, dockerfileSpec, map[string]refusal{
		"path up":          {d(func(s *agentv1.DockerfileStrategy) { s.Path = "../Dockerfile" }), "spec.dockerfile.path", "leads out"},
		"path absolute":    {d(func(s *agentv1.DockerfileStrategy) { s.Path = "/Dockerfile" }), "spec.dockerfile.path", "absolute"},
		"path of dir":      {d(func(s *agentv1.DockerfileStrategy) { s.Path = "." }), "spec.dockerfile.path", "file"},
		"path and inline":  {d(func(s *agentv1.DockerfileStrategy) { s.Path, s.Inline = "a", "FROM x" }), "spec.dockerfile.path", "exclude"},
		"inline too large": {d(func(s *agentv1.DockerfileStrategy) { s.Inline = strings.Repeat("#", maxInline+1) }), "spec.dockerfile.inline", "longer"},
		"target":           {d(func(s *agentv1.DockerfileStrategy) { s.Target = "a b" }), "spec.dockerfile.target", "stage"},
		"arg name":         {arg("A=B", ""), `spec.dockerfile.build_args["A=B"]`, "name"},
		"arg zero byte":    {arg("A", "\x00"), `spec.dockerfile.build_args["A"]`, "zero byte"},
		"arg too long":     {arg("A", strings.Repeat("x", maxValue+1)), `spec.dockerfile.build_args["A"]`, "131072"},
		"arg attests":      {arg("BUILDKIT_ATTEST_PROVENANCE", "builder-id=x"), `spec.dockerfile.build_args["BUILDKIT_ATTEST_PROVENANCE"]`, "attestations"},
		"too many args":    {d(func(s *agentv1.DockerfileStrategy) { s.BuildArgs = many }), "spec.dockerfile.build_args", "at most 1000"},
		"label name":       {d(func(s *agentv1.DockerfileStrategy) { s.Labels = map[string]string{"": ""} }), `spec.dockerfile.labels[""]`, "name"},
		"host gateway":     {host("x", "host-gateway"), `spec.dockerfile.extra_hosts["x"]`, "is not an IP address"},
		"host list":        {host("x,y=1.2.3.4", "192.0.2.1"), `spec.dockerfile.extra_hosts["x,y=1.2.3.4"]`, "host name"},
		"address list":     {host("x", "192.0.2.1,evil=192.0.2.2"), `spec.dockerfile.extra_hosts["x"]`, "IP address"},
		"address zone":     {host("x", "fe80::1%eth0"), `spec.dockerfile.extra_hosts["x"]`, "IP address"},
	})
}

func TestValidateRefusesSteps(t *testing.T) {
	step := func(change func(*agentv1.BuilderStep)) func(*agentv1.BuildSpec) {
		return func(s *agentv1.BuildSpec) { change(s.GetSteps().Steps[0]) }
	}
	image := func(change func(*agentv1.StepsImage)) func(*agentv1.BuildSpec) {
		return func(s *agentv1.BuildSpec) { change(s.GetSteps().Image) }
	}
	const first = "spec.steps.steps[0]"
	checkRefusals(t, fullSteps, map[string]refusal{
		"no steps":             {func(s *agentv1.BuildSpec) { s.GetSteps().Steps, s.GetSteps().Image = nil, nil }, "spec.steps.steps", "is empty"},
		"too many":             {func(s *agentv1.BuildSpec) { s.GetSteps().Steps = make([]*agentv1.BuilderStep, maxSteps+1) }, "spec.steps.steps", "at most 256"},
		"name":                 {step(func(s *agentv1.BuilderStep) { s.Name = "a]\n" }), first + ".name", "is not a name"},
		"same name":            {func(s *agentv1.BuildSpec) { s.GetSteps().Steps = append(s.GetSteps().Steps, s.GetSteps().Steps[0]) }, "spec.steps.steps[1].name", "another"},
		"image":                {step(func(s *agentv1.BuilderStep) { s.Image = "" }), first + ".image", "is not an image name"},
		"empty program":        {step(func(s *agentv1.BuilderStep) { s.Command = []string{""} }), first + ".command[0]", "is empty"},
		"zero byte":            {step(func(s *agentv1.BuilderStep) { s.Args = []string{"a", "\x00"} }), first + ".args[1]", "zero byte"},
		"env name":             {step(func(s *agentv1.BuilderStep) { s.Env = map[string]string{"1": ""} }), first + `.env["1"]`, "name"},
		"working dir":          {step(func(s *agentv1.BuilderStep) { s.WorkingDir = "../.." }), first + ".working_dir", "leads out"},
		"user":                 {step(func(s *agentv1.BuilderStep) { s.User = "a:b:c" }), first + ".user", "is not a user"},
		"timeout":              {step(func(s *agentv1.BuilderStep) { s.Timeout = durationpb.New(-1) }), first + ".timeout", "positive"},
		"broken timeout":       {step(func(s *agentv1.BuilderStep) { s.Timeout = &durationpb.Duration{Seconds: math.MaxInt64} }), first + ".timeout", "positive"},
		"secret":               {step(func(s *agentv1.BuilderStep) { s.Secrets[0].Id = "other" }), first + ".secrets[0].id", "is not in spec.secrets"},
		"secret path":          {step(func(s *agentv1.BuilderStep) { s.Secrets[0].Path = "rel" }), first + ".secrets[0].path", "absolute"},
		"secret in proc":       {step(func(s *agentv1.BuilderStep) { s.Secrets[0].Path = "/proc/1/x" }), first + ".secrets[0].path", "sandbox"},
		"secret in root":       {step(func(s *agentv1.BuilderStep) { s.Secrets[0].Path = "//" }), first + ".secrets[0].path", "root"},
		"secret env":           {step(func(s *agentv1.BuilderStep) { s.Secrets[0].Env = "A=B" }), first + ".secrets[0].env", "variable"},
		"cache ID":             {step(func(s *agentv1.BuilderStep) { s.Caches[0].Id = "../x" }), first + ".caches[0].id", "is not the name of a cache"},
		"cache in root":        {step(func(s *agentv1.BuilderStep) { s.Caches[0].Path = "/" }), first + ".caches[0].path", "root"},
		"cache over workspace": {step(func(s *agentv1.BuilderStep) { s.Caches[0].Path = "/workspace/" }), first + ".caches[0].path", "mounted"},
		"cache over secret":    {step(func(s *agentv1.BuilderStep) { s.Caches[0].Path = "/run/secrets/token" }), first + ".caches[0].path", "mounted"},
		"base":                 {image(func(i *agentv1.StepsImage) { i.Base = "A" }), "spec.steps.image.base", "is not an image name"},
		"copy source":          {image(func(i *agentv1.StepsImage) { i.Copies[0].Source = "/etc" }), "spec.steps.image.copies[0].source", "absolute"},
		"copy nothing":         {image(func(i *agentv1.StepsImage) { i.Copies[0].Source = "" }), "spec.steps.image.copies[0].source", "is empty"},
		"copy to":              {image(func(i *agentv1.StepsImage) { i.Copies[0].Destination = "x" }), "spec.steps.image.copies[0].destination", "absolute"},
		"owner":                {image(func(i *agentv1.StepsImage) { i.Copies[0].Chown = "root" }), "spec.steps.image.copies[0].chown", "owner"},
		"huge owner":           {image(func(i *agentv1.StepsImage) { i.Copies[0].Chown = "99999999999" }), "spec.steps.image.copies[0].chown", "owner"},
		"image working dir":    {image(func(i *agentv1.StepsImage) { i.WorkingDir = "x" }), "spec.steps.image.working_dir", "absolute"},
		"platforms":            {func(s *agentv1.BuildSpec) { s.Platforms = []string{"linux/amd64", "linux/arm64"} }, "spec.platforms", "one platform"},
		"named contexts": {func(s *agentv1.BuildSpec) {
			s.Source = &agentv1.Source{NamedContexts: map[string]string{"a": "docker-image://a"}}
		}, "spec.source.named_contexts", "Dockerfiles"},
		"output without image": {func(s *agentv1.BuildSpec) { s.GetSteps().Image, s.Outputs = nil, pushTo("a") }, "spec.outputs", "need an image"},
	})
}

func TestValidateRefusesTheRest(t *testing.T) {
	registry := func(r *agentv1.RegistryOutput) func(*agentv1.BuildSpec) {
		return func(s *agentv1.BuildSpec) { s.Outputs = []*agentv1.Output{{To: &agentv1.Output_Registry{Registry: r}}} }
	}
	cache := func(kind string, attrs ...string) *agentv1.CacheRef {
		c := &agentv1.CacheRef{Type: kind, Attributes: map[string]string{}}
		for i := 0; i < len(attrs); i += 2 {
			c.Attributes[attrs[i]] = attrs[i+1]
		}
		return c
	}
	to := func(c *agentv1.CacheRef) func(*agentv1.BuildSpec) {
		return func(s *agentv1.BuildSpec) { s.CacheTo = []*agentv1.CacheRef{c} }
	}
	from := func(c *agentv1.CacheRef) func(*agentv1.BuildSpec) {
		return func(s *agentv1.BuildSpec) { s.CacheFrom = []*agentv1.CacheRef{c} }
	}
	attest := func(kind, value string) func(*agentv1.BuildSpec) {
		return func(s *agentv1.BuildSpec) { s.Attestations = map[string]string{kind: value} }
	}
	checkRefusals(t, dockerfileSpec, map[string]refusal{
		"no strategy":       {func(s *agentv1.BuildSpec) { s.Strategy = nil }, "spec.strategy", "is missing"},
		"unknown sandbox":   {func(s *agentv1.BuildSpec) { s.Sandbox = 99 }, "spec.sandbox", "unknown value 99"},
		"unknown network":   {func(s *agentv1.BuildSpec) { s.Network = -1 }, "spec.network", "unknown value -1"},
		"negative memory":   {func(s *agentv1.BuildSpec) { s.Resources = &agentv1.Resources{MemoryBytes: -1} }, "spec.resources.memory_bytes", "negative"},
		"no time":           {func(s *agentv1.BuildSpec) { s.Timeout = durationpb.New(0) }, "spec.timeout", "positive"},
		"too much time":     {func(s *agentv1.BuildSpec) { s.Timeout = durationpb.New(maxTimeout + 1) }, "spec.timeout", "longer"},
		"epoch":             {func(s *agentv1.BuildSpec) { s.SourceDateEpoch = -1 }, "spec.source_date_epoch", "negative"},
		"platform":          {func(s *agentv1.BuildSpec) { s.Platforms = []string{"linux/amd64", "no such/platform"} }, "spec.platforms[1]", "is not a platform"},
		"platform twice":    {func(s *agentv1.BuildSpec) { s.Platforms = []string{"linux/amd64", "linux/x86_64"} }, "spec.platforms[1]", "twice"},
		"label":             {func(s *agentv1.BuildSpec) { s.Labels = map[string]string{"a\n": ""} }, `spec.labels["a\n"]`, "control"},
		"cache scope":       {func(s *agentv1.BuildSpec) { s.CacheScope = strings.Repeat("x", 300) }, "spec.cache_scope", "256"},
		"secret ID":         {func(s *agentv1.BuildSpec) { s.Secrets = []*agentv1.SecretRef{{Id: "../x"}} }, "spec.secrets[0].id", "is not the ID"},
		"secret twice":      {func(s *agentv1.BuildSpec) { s.Secrets = []*agentv1.SecretRef{{Id: "x"}, {Id: "x"}} }, "spec.secrets[1].id", "twice"},
		"nil secret":        {func(s *agentv1.BuildSpec) { s.Secrets = []*agentv1.SecretRef{nil} }, "spec.secrets[0].id", "is not the ID"},
		"empty output":      {func(s *agentv1.BuildSpec) { s.Outputs = []*agentv1.Output{{}} }, "spec.outputs[0]", "is empty"},
		"output digest":     {registry(&agentv1.RegistryOutput{Image: "a@" + aDigest}), "spec.outputs[0].registry.image", "digest"},
		"output list":       {registry(&agentv1.RegistryOutput{Image: "a,b"}), "spec.outputs[0].registry.image", "is not an image name"},
		"output twice":      {func(s *agentv1.BuildSpec) { s.Outputs = append(pushTo("a"), pushTo("docker.io/library/a:latest")...) }, "spec.outputs[1].registry.image", "twice"},
		"compression":       {registry(&agentv1.RegistryOutput{Image: "a", Compression: "lzma"}), "spec.outputs[0].registry.compression", "is not known"},
		"annotation":        {registry(&agentv1.RegistryOutput{Image: "a", Annotations: map[string]string{"a b": ""}}), `spec.outputs[0].registry.annotations["a b"]`, "space"},
		"cache type":        {to(cache("local", "dest", "/etc")), "spec.cache_to[0].type", "is not known"},
		"cache ref":         {to(cache("registry")), `spec.cache_to[0].attributes["ref"]`, "is not an image name"},
		"cache mode":        {to(cache("registry", "ref", "a", "mode", "x")), `spec.cache_to[0].attributes["mode"]`, "min or max"},
		"cache attribute":   {from(cache("registry", "ref", "a", "store", "x")), `spec.cache_from[0].attributes["store"]`, "is not known"},
		"cache boolean":     {to(cache("registry", "ref", "a", "image-manifest", "x")), `spec.cache_to[0].attributes["image-manifest"]`, "true or false"},
		"inline from":       {from(cache("inline")), "spec.cache_from[0].type", "registry"},
		"attestation":       {attest("other", ""), `spec.attestations["other"]`, "is not known"},
		"attestation form":  {attest("provenance", "mode"), `spec.attestations["provenance"]`, "name=value"},
		"attestation mode":  {attest("provenance", "mode=all"), `spec.attestations["provenance"]`, "min or max"},
		"attested builder":  {attest("provenance", "builder-id=https://trusted"), `spec.attestations["provenance"]`, "builder-id"},
		"attestation image": {attest("sbom", "generator=A B"), `spec.attestations["sbom"]`, "is not an image name"},
	})
	require.EqualError(t, Validate(nil), "spec: is missing")
}

func TestValidateReportsManyFieldsAndNotTooMany(t *testing.T) {
	spec := fullSteps()
	spec.Source = &agentv1.Source{ContextDir: "/x"}
	spec.GetSteps().Steps[0].Image = "A"
	spec.SourceDateEpoch = -1
	err := Validate(spec)
	var fields []string
	for _, f := range Fields(err) {
		fields = append(fields, f.Field)
	}
	require.Equal(t, []string{"spec.source.context_dir", "spec.steps.steps[0].image", "spec.source_date_epoch"}, fields)
	var one *FieldError
	require.True(t, errors.As(err, &one))

	spec.GetSteps().Steps = make([]*agentv1.BuilderStep, maxSteps)
	require.Len(t, Fields(Validate(spec)), maxFieldErrors)
	require.Nil(t, Fields(errors.New("other")))
}

func TestMessagesHideCredentials(t *testing.T) {
	for _, url := range []string{"https://me:hunter2@example.com/a", "ftp://me:hunter2@example.com/a", "ssh://me:hunter2@h/x", "https://me:hunter2@h/a b", "me:hunter2@h:x y", "me:hunter2@h", "x://a/b:hunter2@h"} {
		spec := dockerfileSpec()
		spec.Source = gitSource(url, "")
		require.NotContains(t, Validate(spec).Error(), "hunter2")
		spec.Source = httpSource(url, "")
		require.NotContains(t, Validate(spec).Error(), "hunter2")
	}
}

func FuzzSpec(f *testing.F) {
	for _, s := range []*agentv1.BuildSpec{dockerfileSpec(), fullSteps(), {Source: gitSource("https://example.com/a", "main")}, {Source: inlineFiles("a/b")}} {
		data, err := proto.Marshal(s)
		require.NoError(f, err)
		f.Add(data, []byte(nil))
	}
	f.Fuzz(func(t *testing.T, data, credentials []byte) {
		var spec agentv1.BuildSpec
		var creds agentv1.Credentials
		if proto.Unmarshal(data, &spec) != nil || proto.Unmarshal(credentials, &creds) != nil {
			t.Skip()
		}
		invalid := Validate(&spec)
		plan, err := New(t.Context(), Inputs{Spec: &spec, Credentials: &creds, UploadFile: func(string) (string, error) { return "/nonexistent", nil }})
		if invalid != nil {
			require.Error(t, err)
			return
		}
		if err == nil {
			require.NotNil(t, plan.Build)
			require.NoError(t, plan.Close())
		}
	})
}
