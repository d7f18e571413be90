package strategy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/agent/failure"
	"github.com/kiln-build/kiln/agent/steplimits"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// StepTimeoutError is the end of a step that took too long.
type StepTimeoutError struct {
	// Step is its name.
	Step string
	// Limit is how long it might have taken.
	Limit time.Duration
}

// Error implements error.
func (e *StepTimeoutError) Error() string {
	return fmt.Sprintf("step %q did not end within %s", e.Step, e.Limit)
}

// maxTitle bounds the part of a command that names its step, in bytes.
const maxTitle = 120

// stepsBuild runs builder containers. It is the plan's half that has a gateway.
type stepsBuild struct {
	spec     *agentv1.BuildSpec
	steps    *agentv1.StepsStrategy
	source   *source
	platform ocispecs.Platform
	client   gateway.Client
}

// steps plans builder containers.
func (p *planner) steps() (gateway.BuildFunc, error) {
	if err := p.stepsPlatform(); err != nil {
		return nil, err
	}
	b := stepsBuild{spec: p.spec, steps: p.spec.GetSteps(), source: p.source, platform: p.platform}
	return func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		run := b
		run.client = c
		return run.build(ctx)
	}, nil
}

func (b *stepsBuild) build(ctx context.Context) (*gateway.Result, error) {
	files, err := b.source.resolve(ctx, b.client)
	if err != nil {
		return nil, err
	}
	ws := files.state
	for i, step := range b.steps.GetSteps() {
		limit := step.GetTimeout()
		if limit != nil {
			// What comes before it does not count.
			if _, err := b.solve(ctx, ws, true); err != nil {
				return nil, err
			}
		}
		if ws, err = b.step(ctx, i, step, ws); err != nil {
			return nil, err
		}
		if limit != nil {
			if err := b.within(ctx, step.GetName(), limit.AsDuration(), ws); err != nil {
				return nil, err
			}
		}
	}
	if b.steps.GetImage() == nil {
		// Nothing is exported, but everything is run.
		if _, err := b.solve(ctx, ws, true); err != nil {
			return nil, err
		}
		return withRevision(gateway.NewResult(), files.revision), nil
	}
	res, err := b.image(ctx, ws)
	if err != nil {
		return nil, err
	}
	return withRevision(res, files.revision), nil
}

// within has the workspace made, and gives up after the limit.
func (b *stepsBuild) within(ctx context.Context, name string, limit time.Duration, ws llb.State) error {
	timeout := &StepTimeoutError{Step: name, Limit: limit}
	ctx, cancel := failure.WithLimit(ctx, limit, timeout)
	defer cancel()
	_, err := b.solve(ctx, ws, true)
	if err != nil && errors.Is(context.Cause(ctx), timeout) {
		return timeout
	}
	return err
}

func (b *stepsBuild) solve(ctx context.Context, st llb.State, evaluate bool) (*gateway.Result, error) {
	def, err := st.Marshal(ctx, llb.WithCaps(b.client.BuildOpts().LLBCaps), llb.Platform(b.platform))
	if err != nil {
		return nil, fmt.Errorf("write definition of the steps: %w", err)
	}
	req := gateway.SolveRequest{Definition: def.ToPB(), Evaluate: evaluate}
	for _, c := range b.spec.GetCacheFrom() {
		e := cacheEntry(c)
		req.CacheImports = append(req.CacheImports, gateway.CacheOptionsEntry{Type: e.Type, Attrs: e.Attrs})
	}
	return b.client.Solve(ctx, req)
}

// stepImage is an image that a step runs in, or that the result is based on.
type stepImage struct {
	state llb.State
	// config is the image's configuration as it is, and parsed.
	raw    []byte
	config dockerspec.DockerOCIImage
}

// load looks an image up. Its tag is looked up once: what the build uses is the
// digest that was found.
func (b *stepsBuild) load(ctx context.Context, label, image string) (*stepImage, error) {
	name, err := checkImage(image)
	if err != nil {
		return nil, err
	}
	mode := llb.ResolveModeDefault
	if b.spec.GetPull() {
		mode = llb.ResolveModeForcePull
	}
	ref, dgst, raw, err := b.client.ResolveImageConfig(ctx, name, sourceresolver.Opt{
		LogName:  fmt.Sprintf("[%s] load metadata for %s", label, image),
		ImageOpt: &sourceresolver.ResolveImageOpt{Platform: &b.platform, ResolveMode: mode.String()},
	})
	if err != nil {
		return nil, fmt.Errorf("look up image %s of %s: %w", image, label, err)
	}
	if dgst != "" && !strings.Contains(ref, "@") {
		ref += "@" + dgst.String()
	}
	im := &stepImage{raw: raw}
	if err := json.Unmarshal(raw, &im.config); err != nil {
		return nil, fmt.Errorf("read configuration of image %s of %s: %w", image, label, err)
	}
	im.state = llb.Image(ref, llb.Platform(b.platform), mode, llb.WithCustomName(fmt.Sprintf("[%s] FROM %s", label, image)))
	return im, nil
}

// step returns what a step makes of the workspace.
func (b *stepsBuild) step(ctx context.Context, i int, s *agentv1.BuilderStep, ws llb.State) (llb.State, error) {
	im, err := b.load(ctx, s.GetName(), s.GetImage())
	if err != nil {
		return ws, err
	}
	args := arguments(s, im.config.Config)
	if len(args) == 0 {
		return ws, &InvalidError{Fields: []*FieldError{{
			Field:   item("spec.steps.steps", i) + ".command",
			Message: fmt.Sprintf("is missing; image %s has neither an entry point nor a command", s.GetImage()),
		}}}
	}
	user := s.GetUser()
	if user == "" {
		user = im.config.Config.User
	}
	st := im.state.User(user)
	if dir := s.GetWorkingDir(); path.IsAbs(dir) {
		st = st.Dir(path.Clean(dir))
	} else {
		st = st.Dir(path.Join(workspace, dir))
	}
	for _, env := range im.config.Config.Env {
		if name, value, _ := strings.Cut(env, "="); name != "" {
			st = st.AddEnv(name, value)
		}
	}
	if epoch := b.spec.GetSourceDateEpoch(); epoch > 0 {
		st = st.AddEnv("SOURCE_DATE_EPOCH", strconv.FormatInt(epoch, 10))
	}
	for _, env := range []map[string]string{b.steps.GetEnv(), s.GetEnv()} {
		for _, name := range slices.Sorted(maps.Keys(env)) {
			st = st.AddEnv(name, env[name])
		}
	}
	opts := []llb.RunOption{
		llb.Args(args), llb.AddMount(workspace, ws), llb.WithCustomName(stepTitle(s.GetName(), args)),
	}
	if b.spec.GetNetwork() == agentv1.NetworkMode_NETWORK_MODE_NONE {
		opts = append(opts, llb.Network(pb.NetMode_NONE))
	}
	opts = append(opts, stepResources(b.spec.GetResources())...)
	if d := b.spec.GetDestinations(); len(d) > 0 {
		opts = append(opts, llb.WithDescription(map[string]string{steplimits.DestinationsKey: steplimits.EncodeDestinations(d)}))
	}
	if b.spec.GetNoCache() {
		opts = append(opts, llb.IgnoreCache)
	}
	root := isRoot(user)
	opts = append(opts, stepSecrets(s, root)...)
	opts = append(opts, stepCaches(s, root)...)
	return st.Run(opts...).GetMount(workspace), nil
}

// arguments returns what a step runs: as with a container of Kubernetes, its
// command replaces the entry point and the command of the image, and its arguments
// alone replace the command.
func arguments(s *agentv1.BuilderStep, image dockerspec.DockerOCIImageConfig) []string {
	switch {
	case len(s.GetCommand()) > 0:
		return slices.Concat(s.GetCommand(), s.GetArgs())
	case len(s.GetArgs()) > 0:
		return slices.Concat(image.Entrypoint, s.GetArgs())
	}
	return slices.Concat(image.Entrypoint, image.Cmd)
}

// isRoot reports whether a user is surely root.
func isRoot(user string) bool {
	name, _, _ := strings.Cut(user, ":")
	return name == "" || name == "0" || name == "root"
}

// stepSecrets mounts secrets. A file of a step that does not run as root is
// readable by all of the step's users: nobody else is in its sandbox.
func stepSecrets(s *agentv1.BuilderStep, root bool) []llb.RunOption {
	mode := 0o444
	if root {
		mode = 0o400
	}
	var out []llb.RunOption
	for _, sec := range s.GetSecrets() {
		id := llb.SecretID(sec.GetId())
		if p := secretPath(sec); p != "" {
			out = append(out, llb.AddSecret(path.Clean(p), id, llb.SecretFileOpt(0, 0, mode)))
		}
		if sec.GetEnv() != "" {
			out = append(out, llb.AddSecret(sec.GetEnv(), id, llb.SecretAsEnv(true)))
		}
	}
	return out
}

// stepCaches mounts caches under the names that Dockerfiles have for them.
func stepCaches(s *agentv1.BuilderStep, root bool) []llb.RunOption {
	const dir = "/cache"
	var out []llb.RunOption
	for _, c := range s.GetCaches() {
		first, opts := llb.Scratch(), []llb.MountOption{llb.AsPersistentCacheDir("/"+c.GetId(), llb.CacheMountShared)}
		if !root {
			first = first.File(llb.Mkdir(dir, 0o777), internalName("cache that all users may write to"))
			opts = append(opts, llb.SourcePath(dir))
		}
		out = append(out, llb.AddMount(path.Clean(c.GetPath()), first, opts...))
	}
	return out
}

// stepTitle names a step for people: its name and what it runs, on one line.
func stepTitle(name string, args []string) string {
	line := strings.Map(func(r rune) rune {
		if isControl(r) {
			return ' '
		}
		return r
	}, strings.Join(args, " "))
	return fmt.Sprintf("[%s] %s", name, shorten(line, maxTitle))
}
