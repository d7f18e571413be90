package buildopt

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/ociindex"
	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session/upload/uploadprovider"
	"github.com/moby/buildkit/util/archiveutil"
	"github.com/moby/buildkit/util/gitutil"
	"github.com/moby/buildkit/util/staticfs"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

const (
	// archiveHeader is how much of stdin tells an archive from a Dockerfile.
	archiveHeader = 1024
	// maxDockerfile bounds a Dockerfile that is read from stdin, in bytes.
	maxDockerfile = 16 << 20

	stdin             = "-"
	defaultDockerfile = "Dockerfile"
	ociLayout         = "oci-layout://"

	capContexts = "moby.buildkit.frontend.contexts+forward"
	capGitQuery = "moby.buildkit.frontend.gitquerystring"
)

// inputs sets up the build context, the Dockerfile and the named contexts.
func (b *builder) inputs() error {
	path, file := b.flags.Context, b.flags.Dockerfile
	caps := map[string]bool{}
	if isHTTP(file) && !isDir(path) {
		return fmt.Errorf("--file %s: the Dockerfile can be a URL only when the build context is a directory", file)
	}
	var err error
	switch {
	case path == "":
		err = errors.New("the build context is missing: give a directory, a URL or - (for the current directory: .)")
	case path == stdin && file == stdin:
		err = errors.New("stdin cannot be both the build context and the Dockerfile")
	case path == stdin:
		err = b.stdinContext()
	case isDir(path):
		err = b.dirContext()
	case isRemote(path):
		err = b.remoteContext(caps)
	default:
		if _, serr := os.Stat(path); serr != nil {
			err = fmt.Errorf("build context: %w", serr)
		} else {
			err = fmt.Errorf("build context %s is not a directory", path)
		}
	}
	if err != nil {
		return err
	}
	contexts, err := ParseContexts(b.flags.Contexts)
	if err != nil {
		return fmt.Errorf("--build-context: %w", err)
	}
	for name, value := range contexts {
		caps[capContexts] = true
		if err := b.namedContext(name, value, caps); err != nil {
			return fmt.Errorf("--build-context %s: %w", name, err)
		}
	}
	if len(caps) > 0 {
		var names []string
		for c := range caps {
			names = append(names, c)
		}
		slices.Sort(names)
		b.solve.FrontendAttrs["frontend.caps"] = strings.Join(names, ",")
	}
	return nil
}

// stdinContext takes stdin as an archive that is the context, or as a Dockerfile
// that has an empty context.
func (b *builder) stdinContext() error {
	r := bufio.NewReaderSize(b.env.Stdin, archiveHeader)
	head, err := r.Peek(archiveHeader)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read stdin: %w", err)
	}
	if len(head) == 0 {
		return errors.New("stdin is empty: it must be a Dockerfile or an archive of the build context")
	}
	if archiveutil.IsArchive(head) {
		up := uploadprovider.New()
		b.solve.FrontendAttrs["context"] = up.Add(io.NopCloser(r))
		b.solve.Session = append(b.solve.Session, up)
		b.solve.FrontendAttrs["filename"] = cmp.Or(b.flags.Dockerfile, defaultDockerfile)
		return nil
	}
	if b.flags.Dockerfile != "" {
		return errors.New("both stdin and --file are a Dockerfile: leave one out, or give an archive on stdin")
	}
	b.solve.LocalMounts["context"] = staticfs.NewFS()
	return b.dockerfileFrom(r)
}

// dockerfileFrom sends what r has as the Dockerfile.
func (b *builder) dockerfileFrom(r io.Reader) error {
	data, err := io.ReadAll(io.LimitReader(r, maxDockerfile+1))
	if err != nil {
		return fmt.Errorf("read the Dockerfile from stdin: %w", err)
	}
	if len(data) > maxDockerfile {
		return fmt.Errorf("the Dockerfile on stdin is larger than %d bytes", maxDockerfile)
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return errors.New("the Dockerfile on stdin is empty")
	}
	dir := staticfs.NewFS()
	dir.Add(defaultDockerfile, &types.Stat{Mode: 0o644}, data)
	b.solve.LocalMounts["dockerfile"] = dir
	b.solve.FrontendAttrs["dockerfilekey"] = "dockerfile"
	b.solve.FrontendAttrs["filename"] = defaultDockerfile
	return nil
}

func (b *builder) dirContext() error {
	path, file := b.flags.Context, b.flags.Dockerfile
	if err := b.localMount("context", path); err != nil {
		return fmt.Errorf("build context: %w", err)
	}
	b.solve.SharedKey = sharedKey(path)
	switch file {
	case stdin:
		return b.dockerfileFrom(b.env.Stdin)
	case "":
		return b.dockerfileAt(path, defaultDockerfile)
	}
	if isHTTP(file) {
		return b.dockerfileAtURL(file)
	}
	return b.dockerfileAt(filepath.Dir(file), filepath.Base(file))
}

// dockerfileAtURL has the Dockerfile fetched where the build runs.
func (b *builder) dockerfileAtURL(url string) error {
	b.solve.FrontendAttrs["filename"] = defaultDockerfile
	b.solve.FrontendInputs = map[string]llb.State{
		"dockerfile": llb.HTTP(url, llb.Filename(defaultDockerfile), llb.WithCustomName("[internal] load "+url)),
	}
	return nil
}

// dockerfileAt sends the Dockerfile name in dir.
func (b *builder) dockerfileAt(dir, name string) error {
	if name == defaultDockerfile {
		if _, err := os.Lstat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Lstat(filepath.Join(dir, "dockerfile")); err == nil {
				name = "dockerfile"
			}
		}
	}
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return fmt.Errorf("cannot read the Dockerfile: %w; name another with --file", err)
	}
	st, err := f.Stat()
	f.Close()
	if err != nil {
		return fmt.Errorf("cannot read the Dockerfile: %w", err)
	}
	if st.IsDir() {
		return fmt.Errorf("cannot read the Dockerfile: %s is a directory; name the file with --file", filepath.Join(dir, name))
	}
	if err := b.localMount("dockerfile", dir); err != nil {
		return err
	}
	b.solve.FrontendAttrs["filename"] = name
	return nil
}

func (b *builder) remoteContext(caps map[string]bool) error {
	path, file := b.flags.Context, b.flags.Dockerfile
	b.solve.FrontendAttrs["context"] = path
	gitQuery(path, capGitQuery, caps)
	switch {
	case file == stdin:
		return b.dockerfileFrom(b.env.Stdin)
	case filepath.IsAbs(file):
		b.solve.FrontendAttrs["dockerfilekey"] = "dockerfile"
		return b.dockerfileAt(filepath.Dir(file), filepath.Base(file))
	}
	b.solve.FrontendAttrs["filename"] = cmp.Or(file, defaultDockerfile)
	return nil
}

func (b *builder) namedContext(name, value string, caps map[string]bool) error {
	attrs := b.solve.FrontendAttrs
	switch {
	case strings.HasPrefix(value, "docker-image://"):
		if _, err := reference.ParseNormalizedNamed(strings.TrimPrefix(value, "docker-image://")); err != nil {
			return fmt.Errorf("image %q: %w", value, err)
		}
		attrs["context:"+name] = value
		return nil
	case strings.HasPrefix(value, "target:"):
		attrs["context:"+name] = value
		return nil
	case strings.HasPrefix(value, ociLayout):
		return b.ociContext(name, value)
	case isDir(value):
		mount := name
		if name == "context" || name == "dockerfile" {
			mount = "_" + name
		}
		if err := b.localMount(mount, value); err != nil {
			return err
		}
		attrs["context:"+name] = "local:" + mount
		attrs["sharedkey:localdir:"+name] = sharedKey(value)
		return nil
	case isRemote(value):
		attrs["context:"+name] = value
		gitQuery(value, capGitQuery+"+forward", caps)
		return nil
	}
	if _, err := os.Stat(value); err != nil {
		return err
	}
	return fmt.Errorf("%s is not a directory", value)
}

// ociContext lends an OCI layout on disk to the build under a name of its own.
func (b *builder) ociContext(name, value string) error {
	dir, tag, dgst, err := parseOCILayout(value)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "index.json")); err != nil {
		return fmt.Errorf("%s is not an OCI layout: %w", dir, err)
	}
	if dgst == "" {
		idx := ociindex.NewStoreIndex(dir)
		desc, err := idx.Get(tag)
		if err == nil && desc == nil {
			desc, err = idx.GetSingle()
		}
		if err != nil {
			return fmt.Errorf("OCI layout %s: %w", dir, err)
		}
		if desc == nil {
			return fmt.Errorf("OCI layout %s has no image %q: name one with oci-layout://%s:TAG or @DIGEST", dir, tag, dir)
		}
		dgst = desc.Digest
	}
	store, err := local.NewStore(dir)
	if err != nil {
		return fmt.Errorf("OCI layout %s: %w", dir, err)
	}
	if b.solve.OCIStores == nil {
		b.solve.OCIStores = map[string]content.Store{}
	}
	id := identity.NewID()
	b.solve.OCIStores[id] = store
	ref := ociLayout + id
	if tag != "" {
		ref += ":" + tag
	}
	b.solve.FrontendAttrs["context:"+name] = ref + "@" + dgst.String()
	return nil
}

// parseOCILayout splits oci-layout://DIR[:TAG][@DIGEST]. The tag is latest when
// neither is given.
func parseOCILayout(s string) (dir, tag string, dgst digest.Digest, err error) {
	dir = strings.TrimPrefix(s, ociLayout)
	if i := strings.LastIndex(dir, "@"); i >= 0 && strings.Contains(dir[i:], ":") {
		if dgst, err = digest.Parse(dir[i+1:]); err != nil {
			return "", "", "", fmt.Errorf("OCI layout %q: %w", s, err)
		}
		dir = dir[:i]
	}
	if i := strings.LastIndex(dir, ":"); i >= 0 && wholeTag(dir[i+1:]) {
		dir, tag = dir[:i], dir[i+1:]
	}
	if dir == "" {
		return "", "", "", fmt.Errorf("OCI layout %q has no directory: want oci-layout://DIR[:TAG]", s)
	}
	if tag == "" && dgst == "" {
		tag = "latest"
	}
	return dir, tag, dgst, nil
}

func wholeTag(s string) bool {
	m := reference.TagRegexp.FindString(s)
	return m != "" && m == s
}

func (b *builder) localMount(name, dir string) error {
	f, err := fsutil.NewFS(dir)
	if err != nil {
		return err
	}
	b.solve.LocalMounts[name] = f
	return nil
}

// sharedKey names a directory, so that a later build of it sends only what
// changed. It is a hash: the engine shows the key to nobody who could not read
// the path, but there is no need to send it either.
func sharedKey(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	host, _ := os.Hostname()
	sum := sha256.Sum256([]byte(host + "\x00" + dir))
	return filepath.Base(dir) + ":" + hex.EncodeToString(sum[:8])
}

// gitQuery asks for the capability to understand a git URL with a query, if url
// is one.
func gitQuery(url, capability string, caps map[string]bool) {
	if u, err := gitutil.ParseURL(url); err == nil && len(u.Query) > 0 {
		caps[capability] = true
	}
}

func isHTTP(s string) bool {
	return strings.HasPrefix(s, "http://") || strings.HasPrefix(s, "https://")
}

func isRemote(s string) bool {
	if isHTTP(s) {
		return true
	}
	_, ok, err := dfgitutil.ParseGitRef(s)
	return ok && err == nil
}

func isGitSSH(s string) bool {
	u, err := gitutil.ParseURL(s)
	return err == nil && u.Scheme == gitutil.SSHProtocol
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
