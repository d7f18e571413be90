package strategy

import (
	"context"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/archiveutil"
	"github.com/moby/buildkit/util/gitutil"

	"github.com/kiln-build/kiln/agent/strategy/sessions"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	// localSource is the name of the in-memory directory of an inline or empty source.
	localSource = "source"
	// archiveName is the file that an archive is fetched as. It is still there when the
	// engine could not unpack it.
	archiveName = "kiln-source-archive"
	// archiveHeader is how much of a file tells whether it is an archive, in bytes.
	archiveHeader = 1024
)

// source is the files that a build starts from.
type source struct {
	// field is where the spec says what the main part is.
	field string
	// main returns the main part.
	main func(ctx context.Context, c gateway.Client) (llb.State, error)
	// git is the main part's operation when it is a repository: what a revision is
	// resolved with.
	git *llb.State
	// packed is set when the main part is an archive.
	packed bool
	// uri names the source in provenance.
	uri string

	images     []*agentv1.ImageSource
	contextDir string
	options    []llb.ImageOption
}

// newSource plans the source, and adds what it needs to the loan and mounts.
func (p *planner) newSource() (*source, error) {
	spec := p.spec.GetSource()
	dir, err := cleanRelative(spec.GetContextDir())
	if err != nil {
		return nil, err
	}
	s := &source{images: spec.GetImages(), contextDir: dir, options: p.imageOptions()}
	switch from := spec.GetFrom().(type) {
	case *agentv1.Source_Git:
		err = p.gitSource(s, from.Git)
	case *agentv1.Source_Http:
		err = p.httpSource(s, from.Http)
	case *agentv1.Source_Upload:
		err = p.uploadSource(s, from.Upload)
	default:
		s.field = "spec.source.inline"
		files := inlineFS(spec.GetInline().GetFiles(), p.spec.GetSourceDateEpoch())
		p.opt.LocalMounts[localSource] = files
		s.main = localState(localSource, "load inline source")
	}
	return s, err
}

// localState returns a directory of the session. Its files are compared by what is
// in them: those of two builds may agree in everything else.
func localState(name, title string) func(context.Context, gateway.Client) (llb.State, error) {
	return func(_ context.Context, c gateway.Client) (llb.State, error) {
		return llb.Local(name,
			llb.SessionID(c.BuildOpts().SessionID),
			llb.SharedKeyHint("kiln-"+name),
			llb.Differ(llb.DiffNone, false),
			internalName(title),
		), nil
	}
}

func internalName(title string) llb.ConstraintsOpt {
	return llb.WithCustomName("[internal] " + title)
}

// imageOptions are those of every image that the plan itself names.
func (p *planner) imageOptions() []llb.ImageOption {
	opts := []llb.ImageOption{llb.Platform(p.platform)}
	if p.spec.GetPull() {
		opts = append(opts, llb.ResolveModeForcePull)
	}
	return opts
}

func (p *planner) gitSource(s *source, g *agentv1.GitSource) error {
	u, err := parseGitURL(g.GetUrl())
	if err != nil {
		return err
	}
	s.field = "spec.source.git"
	s.uri = u.Remote
	if g.GetRevision() != "" {
		s.uri += "#" + g.GetRevision()
	}
	title := "load git source " + s.uri
	opts := []llb.GitOption{llb.GitRef(g.GetRevision()), internalName(title), llb.AuthTokenSecret(""), llb.AuthHeaderSecret("")}
	if len(s.images) == 0 && s.contextDir != "." && plainDir.MatchString(s.contextDir) {
		opts = append(opts, llb.GitSubDir(s.contextDir))
		s.contextDir = "."
	}
	if p.spec.GetSourceDateEpoch() > 0 {
		opts = append(opts, llb.GitMTimeCommit())
	}
	if isTrue(p.spec.GetDockerfile().GetBuildArgs()["BUILDKIT_CONTEXT_KEEP_GIT_DIR"]) {
		opts = append(opts, llb.KeepGitDir())
	}
	if cred := p.in.Credentials.GetGit()[g.GetCredential()]; g.GetCredential() != "" {
		// Nobody who does not read this process's memory can name the secret.
		id := "kiln-git-" + identity.NewID()
		if u.Scheme == gitutil.SSHProtocol {
			p.loan.SSHKeys[id] = cred.GetSshPrivateKey()
			opts = append(opts, llb.MountSSHSock(id), llb.KnownSSHHosts(string(cred.GetSshKnownHosts())))
		} else {
			p.loan.Secrets[id] = basicAuth(cred)
			opts = append(opts, llb.AuthHeaderSecret(id))
		}
	}
	st := llb.Git(g.GetUrl(), "", opts...)
	s.git = &st
	s.main = func(context.Context, gateway.Client) (llb.State, error) { return st, nil }
	return nil
}

func (p *planner) httpSource(s *source, h *agentv1.HTTPSource) error {
	u, err := parseHTTPURL(h.GetUrl(), true)
	if err != nil {
		return err
	}
	// What follows the path may be a signature.
	u.RawQuery, u.Fragment = "", ""
	s.field, s.uri = "spec.source.http", u.String()
	opts := []llb.HTTPOption{llb.Filename(archiveName), internalName("load source archive " + s.uri)}
	if h.GetDigest() != "" {
		d, err := checkDigest(h.GetDigest())
		if err != nil {
			return err
		}
		opts = append(opts, llb.Checksum(d))
	}
	s.archive(llb.HTTP(h.GetUrl(), opts...))
	return nil
}

// uploadSource has the archive fetched from the session under a URL that is always
// the same, so that what was unpacked once is found again by its digest.
func (p *planner) uploadSource(s *source, u *agentv1.UploadedSource) error {
	s.field = "spec.source.upload"
	d, err := checkDigest(u.GetDigest())
	if err != nil {
		return err
	}
	if p.in.UploadFile == nil {
		return fmt.Errorf("%s: uploads are not available here", s.field)
	}
	file, err := p.in.UploadFile(d.String())
	if err != nil {
		return sourceError(s.field, "get uploaded archive: %w", err)
	}
	p.loan.Uploads[d.Encoded()] = file
	s.archive(llb.HTTP(sessions.UploadURL(d.Encoded()), llb.Filename(archiveName), llb.Checksum(d), internalName("load uploaded source")))
	return nil
}

// archive makes the unpacked file of from the main part.
func (s *source) archive(from llb.State) {
	s.packed = true
	s.main = func(ctx context.Context, c gateway.Client) (llb.State, error) {
		ref, err := solve(ctx, c, from)
		if err != nil {
			return llb.State{}, sourceError(s.field, "fetch archive: %w", err)
		}
		head, err := ref.ReadFile(ctx, gateway.ReadRequest{Filename: archiveName, Range: &gateway.FileRange{Length: archiveHeader}})
		if err != nil {
			return llb.State{}, sourceError(s.field, "read archive: %w", err)
		}
		if !archiveutil.IsArchive(head) {
			return llb.State{}, sourceError(s.field, "it is not an archive; want tar, with or without gzip, bzip2, xz or zstd")
		}
		return llb.Scratch().File(llb.Copy(from, "/"+archiveName, "/", &llb.CopyInfo{AttemptUnpack: true}), internalName("unpack source archive")), nil
	}
}

// files is a source that is there.
type files struct {
	state llb.State
	// revision is the commit of a git source.
	revision string
}

// resolve has the engine look the source up, and returns it as the build sees it.
func (s *source) resolve(ctx context.Context, c gateway.Client) (*files, error) {
	out := &files{}
	var err error
	if s.git != nil {
		if out.revision, err = s.commit(ctx, c); err != nil {
			return nil, err
		}
	}
	if out.state, err = s.main(ctx, c); err != nil {
		return nil, err
	}
	// It is made here and not when the build needs it, so that what goes wrong is known
	// to be the source's fault.
	ref, err := solve(ctx, c, out.state)
	if err != nil {
		return nil, &SourceError{Field: s.field, err: err}
	}
	if s.packed {
		if _, err := ref.StatFile(ctx, gateway.StatRequest{Path: archiveName}); err == nil {
			return nil, sourceError(s.field, "the archive cannot be unpacked: it is broken")
		}
	}
	for i, im := range s.images {
		if out.state, err = s.copyImage(out.state, im); err != nil {
			return nil, err
		}
		if ref, err = solve(ctx, c, out.state); err != nil {
			return nil, &SourceError{Field: item("spec.source.images", i), err: err}
		}
	}
	if s.contextDir == "." {
		return out, nil
	}
	st, err := ref.StatFile(ctx, gateway.StatRequest{Path: s.contextDir})
	if err != nil {
		return nil, sourceError("spec.source.context_dir", "%s is not in the source", quote(s.contextDir))
	}
	if mode := os.FileMode(st.Mode); !mode.IsDir() && mode&os.ModeSymlink == 0 {
		return nil, sourceError("spec.source.context_dir", "%s is not a directory of the source", quote(s.contextDir))
	}
	out.state = llb.Scratch().File(llb.Copy(out.state, path.Join("/", s.contextDir), "/", &llb.CopyInfo{
		CopyDirContentsOnly: true, FollowSymlinks: true,
	}), internalName("context directory "+s.contextDir))
	return out, nil
}

// commit returns the commit that the git source is.
func (s *source) commit(ctx context.Context, c gateway.Client) (string, error) {
	def, err := s.git.Marshal(ctx, llb.WithCaps(c.BuildOpts().LLBCaps))
	if err != nil {
		return "", &SourceError{Field: s.field, err: err}
	}
	var op pb.Op
	if err := op.UnmarshalVT(def.Def[0]); err != nil {
		return "", &SourceError{Field: s.field, err: err}
	}
	md, err := c.ResolveSourceMetadata(ctx, op.GetSource(), sourceresolver.Opt{LogName: "[internal] resolve git source " + s.uri})
	if err != nil {
		return "", sourceError(s.field, "fetch repository: %w", err)
	}
	if md.Git == nil {
		return "", nil
	}
	if md.Git.CommitChecksum != "" {
		return md.Git.CommitChecksum, nil
	}
	return md.Git.Checksum, nil
}

// copyImage copies paths of an image over st. A directory is copied with its name,
// unless its path ends with "/.".
func (s *source) copyImage(st llb.State, im *agentv1.ImageSource) (llb.State, error) {
	name, err := checkImage(im.GetImage())
	if err != nil {
		return st, err
	}
	image := llb.Image(name, append([]llb.ImageOption{internalName("source image " + im.GetImage())}, s.options...)...)
	for _, p := range im.GetPaths() {
		dir, err := cleanRelative(p.GetDestinationDir())
		if err != nil {
			return st, err
		}
		from := path.Clean(p.GetSourcePath())
		to := strings.TrimSuffix(path.Join("/", dir), "/") + "/"
		st = st.File(llb.Copy(image, from, to, &llb.CopyInfo{
			CreateDestPath: true, FollowSymlinks: true,
			CopyDirContentsOnly: from == "/" || strings.HasSuffix(p.GetSourcePath(), "/."),
		}), internalName(fmt.Sprintf("copy %s of %s to %s", from, im.GetImage(), to)))
	}
	return st, nil
}

// solve returns a reference to what st is.
func solve(ctx context.Context, c gateway.Client, st llb.State) (gateway.Reference, error) {
	def, err := st.Marshal(ctx, llb.WithCaps(c.BuildOpts().LLBCaps))
	if err != nil {
		return nil, err
	}
	res, err := c.Solve(ctx, gateway.SolveRequest{Definition: def.ToPB(), Evaluate: true})
	if err != nil {
		return nil, err
	}
	ref, err := res.SingleRef()
	if err != nil {
		return nil, err
	}
	if ref == nil {
		return nil, errNoResult
	}
	return ref, nil
}
