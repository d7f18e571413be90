package strategy

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// imageLabel names the image in the titles of what makes it.
const imageLabel = "image"

// image makes the result of the steps: the base with what is copied from the
// workspace.
func (b *stepsBuild) image(ctx context.Context, ws llb.State) (*gateway.Result, error) {
	spec := b.steps.GetImage()
	base := &stepImage{state: llb.Scratch()}
	if spec.GetBase() != "" {
		var err error
		if base, err = b.load(ctx, imageLabel, spec.GetBase()); err != nil {
			return nil, err
		}
	}
	st := base.state
	var history []ocispecs.History
	for _, c := range spec.GetCopies() {
		action, title, err := copyFromWorkspace(ws, c)
		if err != nil {
			return nil, err
		}
		opts := []llb.ConstraintsOpt{llb.WithCustomNamef("[%s] %s", imageLabel, title)}
		if b.spec.GetNoCache() {
			opts = append(opts, llb.IgnoreCache)
		}
		st = st.File(action, opts...)
		history = append(history, ocispecs.History{CreatedBy: title, Comment: "kiln"})
	}
	if len(spec.GetCopies()) == 0 && len(b.steps.GetSteps()) > 0 {
		// The image takes nothing from the steps, and they are run all the same.
		if _, err := b.solve(ctx, ws, true); err != nil {
			return nil, err
		}
	}
	config, err := json.Marshal(b.config(spec, base, history))
	if err != nil {
		return nil, fmt.Errorf("write configuration of the image: %w", err)
	}
	res, err := b.solve(ctx, st, false)
	if err != nil {
		return nil, err
	}
	res.AddMeta(exptypes.ExporterImageConfigKey, config)
	if base.raw != nil {
		res.AddMeta(exptypes.ExporterImageBaseConfigKey, base.raw)
	}
	return res, nil
}

// copyFromWorkspace returns the action that a copy is, with its title. Of a
// directory the content is copied, as a Dockerfile does.
func copyFromWorkspace(ws llb.State, c *agentv1.WorkspaceCopy) (*llb.FileAction, string, error) {
	from, err := cleanRelative(c.GetSource())
	if err != nil {
		return nil, "", err
	}
	to := path.Clean(c.GetDestination())
	if strings.HasSuffix(c.GetDestination(), "/") && to != "/" {
		to += "/"
	}
	uid, gid, err := parseOwner(c.GetChown())
	if err != nil {
		return nil, "", err
	}
	title := fmt.Sprintf("COPY %s %s", from, to)
	if c.GetChown() != "" {
		title = fmt.Sprintf("COPY --chown=%d:%d %s %s", uid, gid, from, to)
	}
	return llb.Copy(ws, path.Join("/", from), to, &llb.CopyInfo{
		CreateDestPath: true, CopyDirContentsOnly: true, FollowSymlinks: true,
	}, llb.WithUIDGID(uid, gid)), title, nil
}

// parseOwner reads UID or UID:GID. Nothing is 0:0, and the group without a colon is
// the number of the user, as in a Dockerfile.
func parseOwner(s string) (uid, gid int, err error) {
	if s == "" {
		return 0, 0, nil
	}
	u, g, ok := strings.Cut(s, ":")
	if uid, err = strconv.Atoi(u); err == nil {
		gid = uid
		if ok {
			gid, err = strconv.Atoi(g)
		}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("owner %s: %w", quote(s), err)
	}
	return uid, gid, nil
}

// config returns the configuration of the image: the base's, with what the spec
// says in place of it. As with a Dockerfile, a new entry point drops the base's
// arguments.
func (b *stepsBuild) config(spec *agentv1.StepsImage, base *stepImage, history []ocispecs.History) *dockerspec.DockerOCIImage {
	im := base.config
	if base.raw == nil {
		im.Platform = b.platform
		im.RootFS.Type = "layers"
	}
	im.Created = nil
	if epoch := b.spec.GetSourceDateEpoch(); epoch > 0 {
		t := time.Unix(epoch, 0).UTC()
		im.Created = &t
	}
	im.History = append(slices.Clone(im.History), history...)
	c := &im.Config
	c.Env = slices.Clone(c.Env)
	for _, name := range slices.Sorted(maps.Keys(spec.GetEnv())) {
		c.Env = setEnv(c.Env, name, spec.GetEnv()[name])
	}
	if len(spec.GetEntrypoint()) > 0 {
		c.Entrypoint, c.Cmd = spec.GetEntrypoint(), nil
	}
	if len(spec.GetCmd()) > 0 {
		c.Cmd = spec.GetCmd()
	}
	if spec.GetWorkingDir() != "" {
		c.WorkingDir = path.Clean(spec.GetWorkingDir())
	}
	if spec.GetUser() != "" {
		c.User = spec.GetUser()
	}
	if len(spec.GetLabels()) > 0 {
		labels := maps.Clone(c.Labels)
		if labels == nil {
			labels = map[string]string{}
		}
		maps.Copy(labels, spec.GetLabels())
		c.Labels = labels
	}
	return &im
}

// setEnv gives a variable a value in a list of NAME=VALUE.
func setEnv(env []string, name, value string) []string {
	entry := name + "=" + value
	for i, e := range env {
		if n, _, _ := strings.Cut(e, "="); n == name {
			env[i] = entry
			return env
		}
	}
	return append(env, entry)
}
