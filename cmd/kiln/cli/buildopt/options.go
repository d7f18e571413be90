package buildopt

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/solver/pb"
	"github.com/tonistiigi/fsutil"
)

// Flags has the values of the flags of kiln build as the user wrote them.
type Flags struct {
	Context                   string
	Dockerfile                string
	Tags, BuildArgs, Labels   []string
	Annotations, Contexts     []string
	Outputs, Platforms        []string
	Secrets, SSH              []string
	CacheFrom, CacheTo        []string
	NoCacheFilter             []string
	Hosts, Ulimits, Attests   []string
	Allow                     []string
	Target, Network, ShmSize  string
	Memory, CPUs              string
	PIDsLimit, Disk           string
	StepTimeout               string
	Destinations              []string
	Provenance, SBOM          string
	ImageIDFile               string
	NoCache, Pull, Push, Load bool
}

// Env is what a build takes from the process around it.
type Env struct {
	Stdin  io.Reader
	Stdout Stdout
	// Docker is the user's Docker configuration: registry credentials and proxies.
	Docker *configfile.ConfigFile
}

// Request is a checked build.
type Request struct {
	Solve client.SolveOpt
	// StdoutUsed is set when an output writes to stdout.
	StdoutUsed bool
}

// New checks the flags and turns them into a request. Every error is the user's.
func New(f Flags, env Env) (*Request, error) {
	if err := refuse(f); err != nil {
		return nil, err
	}
	b := &builder{flags: f, env: env}
	b.solve = client.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{}, LocalMounts: map[string]fsutil.FS{},
	}
	for _, step := range []func() error{b.values, b.attestations, b.outputs, b.caches, b.inputs, b.session} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return &Request{Solve: b.solve, StdoutUsed: b.stdoutUsed}, nil
}

// refuse reports what kiln has no equivalent of, by name.
func refuse(f Flags) error {
	switch {
	case len(f.Allow) > 0:
		return fmt.Errorf("--allow %s: entitlements do not exist in kiln; every step runs in a sandbox without privileges", strings.Join(f.Allow, ","))
	case f.Load:
		return fmt.Errorf("--load: %w", ErrLoad)
	case f.NoCache && len(f.NoCacheFilter) > 0:
		return errors.New("--no-cache and --no-cache-filter cannot be used together")
	}
	switch f.Network {
	case "", "default", "none":
		return nil
	case "host":
		return errors.New("--network host: a step never gets the node's network; use default or none")
	}
	return fmt.Errorf("--network %s: want default or none", f.Network)
}

type builder struct {
	flags      Flags
	env        Env
	solve      client.SolveOpt
	buildArgs  map[string]string
	attests    map[string]*string
	stdoutUsed bool
	sessions   []session.Attachable
}

// values sets the front end's attributes that come from one flag each.
func (b *builder) values() error {
	f, attrs := b.flags, b.solve.FrontendAttrs
	var err error
	if b.buildArgs, err = ParsePairs(f.BuildArgs, true); err != nil {
		return fmt.Errorf("--build-arg: %w", err)
	}
	if _, ok := b.buildArgs["SOURCE_DATE_EPOCH"]; !ok {
		if v := os.Getenv("SOURCE_DATE_EPOCH"); v != "" {
			b.buildArgs["SOURCE_DATE_EPOCH"] = v
		}
	}
	if v := b.buildArgs["SOURCE_DATE_EPOCH"]; v != "" && v != "context" {
		if _, err := strconv.ParseInt(v, 10, 64); err != nil {
			return fmt.Errorf("SOURCE_DATE_EPOCH=%s: want seconds since 1970", v)
		}
	}
	b.proxies()
	for k, v := range b.buildArgs {
		attrs["build-arg:"+k] = v
	}
	labels, err := ParsePairs(f.Labels, false)
	if err != nil {
		return fmt.Errorf("--label: %w", err)
	}
	for k, v := range labels {
		attrs["label:"+k] = v
	}
	pp, err := ParsePlatforms(f.Platforms)
	if err != nil {
		return fmt.Errorf("--platform: %w", err)
	}
	hosts, err := ParseHosts(f.Hosts)
	if err != nil {
		return fmt.Errorf("--add-host: %w", err)
	}
	ulimits, err := ParseUlimits(f.Ulimits)
	if err != nil {
		return fmt.Errorf("--ulimit: %w", err)
	}
	shm, err := ParseSize(f.ShmSize)
	if err != nil {
		return fmt.Errorf("--shm-size: %w", err)
	}
	if err := b.limits(); err != nil {
		return err
	}
	if err := b.destinations(); err != nil {
		return err
	}
	set := func(key, value string) {
		if value != "" {
			attrs[key] = value
		}
	}
	set("platform", strings.Join(pp, ","))
	set("add-hosts", hosts)
	set("ulimit", ulimits)
	set("target", f.Target)
	set("no-cache", strings.Join(f.NoCacheFilter, ","))
	if shm > 0 {
		attrs["shm-size"] = strconv.FormatInt(shm, 10)
	}
	if f.NoCache {
		attrs["no-cache"] = ""
	}
	if f.Pull {
		attrs["image-resolve-mode"] = pb.AttrImageResolveModeForcePull
	}
	if f.Network == "none" {
		attrs["force-network-mode"] = "none"
	}
	if isTrue(b.buildArgs["BUILDKIT_MULTI_PLATFORM"]) {
		attrs["multi-platform"] = "true"
	}
	if v, ok := b.buildArgs["BUILDKIT_SYNTAX"]; ok {
		v = strings.TrimSpace(v)
		if v == "" {
			return errors.New("--build-arg BUILDKIT_SYNTAX: the value is empty")
		}
		b.solve.Frontend = "gateway.v0"
		attrs["source"], _, _ = strings.Cut(v, " ")
		attrs["cmdline"] = v
	}
	return nil
}

// proxies adds the proxies of the user's Docker configuration as build arguments,
// as Docker does, unless the user gave their own.
func (b *builder) proxies() {
	if b.env.Docker == nil {
		return
	}
	for key, value := range b.env.Docker.ParseProxyConfig("", nil) {
		given := slices.ContainsFunc(slices.Collect(maps.Keys(b.buildArgs)), func(k string) bool { return strings.EqualFold(k, key) })
		if value != nil && !given {
			b.solve.FrontendAttrs["build-arg:"+key] = *value
		}
	}
}

func (b *builder) attestations() error {
	values := slices.Clone(b.flags.Attests)
	if v := b.flags.Provenance; v != "" {
		values = append(values, Shorthand("provenance", v))
	}
	if v := b.flags.SBOM; v != "" {
		values = append(values, Shorthand("sbom", v))
	}
	var err error
	if b.attests, err = ParseAttests(values); err != nil {
		return fmt.Errorf("--attest: %w", err)
	}
	for kind, v := range b.attests {
		if v != nil {
			b.solve.FrontendAttrs["attest:"+kind] = *v
		}
	}
	if _, given := b.attests["provenance"]; !given && !isTrue(os.Getenv("BUILDX_NO_DEFAULT_ATTESTATIONS")) {
		b.solve.FrontendAttrs["attest:provenance"] = "mode=min,inline-only=true"
	}
	return nil
}

func (b *builder) outputs() error {
	f := b.flags
	exports, used, err := ParseOutputs(f.Outputs, b.env.Stdout)
	if err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	tags, err := ParseTags(f.Tags)
	if err != nil {
		return fmt.Errorf("--tag: %w", err)
	}
	annotations, err := ParseAnnotations(f.Annotations)
	if err != nil {
		return fmt.Errorf("--annotation: %w", err)
	}
	images := func(e client.ExportEntry) bool { return e.Type == client.ExporterImage }
	if f.Push && !slices.ContainsFunc(exports, images) {
		exports = append(exports, client.ExportEntry{Type: client.ExporterImage, Attrs: map[string]string{}})
	}
	if len(exports) == 0 {
		// The result stays in kiln's own store, under its tags if there are any.
		exports = append(exports, client.ExportEntry{Type: client.ExporterImage, Attrs: map[string]string{}})
	}
	kept := exports[:0]
	for _, e := range exports {
		if f.Push && images(e) {
			e.Attrs["push"] = "true"
			if _, ok := e.Attrs["unpack"]; !ok {
				e.Attrs["unpack"] = "false"
			}
		}
		if err := b.checkOutput(e, tags); err != nil {
			return err
		}
		switch e.Type {
		case client.ExporterImage, client.ExporterOCI, client.ExporterDocker:
			if len(tags) > 0 {
				e.Attrs["name"] = strings.Join(tags, ",")
			}
		case typeCacheOnly:
			continue
		}
		maps.Copy(e.Attrs, annotations)
		kept = append(kept, e)
	}
	b.solve.Exports, b.stdoutUsed = kept, used
	return nil
}

// checkOutput reports combinations of outputs and other flags that cannot work.
func (b *builder) checkOutput(e client.ExportEntry, tags []string) error {
	switch e.Type {
	case client.ExporterImage:
		if isTrue(e.Attrs["push"]) && len(tags) == 0 && e.Attrs["name"] == "" {
			return errors.New("--push: an image needs a name to be pushed; add --tag REGISTRY/NAME:TAG")
		}
	case client.ExporterDocker:
		if strings.Contains(b.solve.FrontendAttrs["platform"], ",") {
			return errors.New("--output type=docker: a Docker archive holds one platform; use type=oci")
		}
		for kind, v := range b.attests {
			if v != nil {
				return fmt.Errorf("--output type=docker: a Docker archive cannot hold attestations (%s); use type=oci", kind)
			}
		}
	case client.ExporterLocal, client.ExporterTar:
		if b.flags.ImageIDFile != "" {
			return fmt.Errorf("--iidfile: an output of type %s has no image ID", e.Type)
		}
	}
	return nil
}

func (b *builder) caches() error {
	var err error
	if b.solve.CacheImports, err = ParseCacheFrom(b.flags.CacheFrom); err != nil {
		return fmt.Errorf("--cache-from: %w", err)
	}
	if b.solve.CacheExports, err = ParseCacheTo(b.flags.CacheTo); err != nil {
		return fmt.Errorf("--cache-to: %w", err)
	}
	if isTrue(b.buildArgs["BUILDKIT_INLINE_CACHE"]) {
		b.solve.CacheExports = append(b.solve.CacheExports, client.CacheOptionsEntry{Type: "inline", Attrs: map[string]string{}})
	}
	return nil
}

// session offers what the build may ask of the user: credentials, secrets and SSH
// agents.
func (b *builder) session() error {
	if b.env.Docker != nil {
		b.sessions = append(b.sessions, authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
			AuthConfigProvider: authprovider.LoadAuthConfig(b.env.Docker),
		}))
	}
	if len(b.flags.Secrets) > 0 {
		p, err := ParseSecrets(b.flags.Secrets)
		if err != nil {
			return fmt.Errorf("--secret: %w", err)
		}
		b.sessions = append(b.sessions, p)
	}
	ssh := b.flags.SSH
	if len(ssh) == 0 && isGitSSH(b.flags.Context) && os.Getenv("SSH_AUTH_SOCK") != "" {
		ssh = []string{"default"}
	}
	if len(ssh) > 0 {
		p, err := ParseSSH(ssh)
		if err != nil {
			return fmt.Errorf("--ssh: %w", err)
		}
		b.sessions = append(b.sessions, p)
	}
	b.solve.Session = append(b.solve.Session, b.sessions...)
	return nil
}
