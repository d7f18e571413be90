package escape

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/sandbox"
)

// buildTimeout bounds one build.
const buildTimeout = 90 * time.Second

// env is what an entry attacks, in one class of sandbox.
type env struct {
	*world
	Class sandbox.Class
}

// build is what an attacker sends. Its Dockerfile may start FROM tools: a root file
// system with busybox and its applets, /bin/attack (testdata/attack) and nothing
// else.
type build struct {
	// Tenant is the attacker when it is empty.
	Tenant     string
	Dockerfile string
	// Files are those of the context by name, besides the Dockerfile; all may be run.
	Files map[string]string
	// Context replaces the context by a directory of the test.
	Context string
	// Contexts are more named contexts: directories by name.
	Contexts map[string]string
	// Args are build arguments, Attrs any attributes of the front end.
	Args, Attrs map[string]string
	Secrets     map[string]string
	// Session has what else the client offers.
	Session []session.Attachable
	// LLB is built in place of the Dockerfile.
	LLB *llb.Definition
	// NoExport leaves the result in the engine; otherwise it is exported to Dir.
	NoExport bool
	// Meets is set, to a name, when the build runs while others do; see Builds.
	Meets string
	// Log is called with what steps write as it comes.
	Log func(text string)
	// Change may change everything before the call.
	Change func(*client.SolveOpt)
	// Node is another node than the world's.
	Node *engine.Node
}

// result is how a build ended.
type result struct {
	// Log is what the steps wrote, and Dir the exported files.
	Log, Dir string
	Err      error
	Status   []*client.SolveStatus
	Response *client.SolveResponse
}

// Build builds, through BuildKit's API of the tenant's engine in the sandbox of e.
func (e *env) Build(t *testing.T, b build) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	return e.BuildContext(t, ctx, b)
}

// MustBuild is Build for a build that succeeds.
func (e *env) MustBuild(t *testing.T, b build) result {
	t.Helper()
	r := e.Build(t, b)
	require.NoError(t, r.Err, r.Log)
	return r
}

// BuildContext is Build until ctx ends. It may be called by several goroutines, with
// builds that fail at no requirement.
func (e *env) BuildContext(t *testing.T, ctx context.Context, b build) (r result) {
	t.Helper()
	node := b.Node
	if node == nil {
		node = e.Node
	}
	tenant := b.Tenant
	if tenant == "" {
		tenant = attacker
	}
	eng, release, err := node.Engine(ctx, engine.Domain{Tenant: tenant, Sandbox: e.Class})
	require.NoError(t, err)
	defer release()
	c, err := eng.Client(ctx)
	require.NoError(t, err)
	defer c.Close()

	r.Dir = filepath.Join(e.dir(t), "out")
	opt := e.solveOpt(t, b, r.Dir)
	if b.Change != nil {
		b.Change(&opt)
	}
	ch := make(chan *client.SolveStatus)
	var log bytes.Buffer
	var reading sync.WaitGroup
	reading.Go(func() {
		for s := range ch {
			r.Status = append(r.Status, s)
			for _, l := range s.Logs {
				log.Write(l.Data)
				if b.Log != nil {
					b.Log(string(l.Data))
				}
			}
		}
	})
	r.Response, r.Err = c.Solve(ctx, b.LLB, opt, ch)
	reading.Wait()
	r.Log = log.String()
	return r
}

func (e *env) solveOpt(t *testing.T, b build, out string) client.SolveOpt {
	t.Helper()
	dir := b.Context
	if dir == "" {
		dir = e.dir(t)
		for name, content := range b.Files {
			path := filepath.Join(dir, name)
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, os.WriteFile(path, []byte(content), 0o755))
		}
	}
	file := e.dir(t)
	require.NoError(t, os.WriteFile(filepath.Join(file, "Dockerfile"), []byte(b.Dockerfile), 0o644))
	local := func(dir string) fsutil.FS {
		f, err := fsutil.NewFS(dir)
		require.NoError(t, err)
		return f
	}
	attrs := map[string]string{"context:tools": "local:tools"}
	mounts := map[string]fsutil.FS{"context": local(dir), "dockerfile": local(file), "tools": local(e.tools)}
	for name, dir := range b.Contexts {
		attrs["context:"+name] = "local:" + name
		mounts[name] = local(dir)
	}
	for k, v := range b.Args {
		attrs["build-arg:"+k] = v
	}
	maps.Copy(attrs, b.Attrs)
	opt := client.SolveOpt{FrontendAttrs: attrs, LocalMounts: mounts, Session: b.Session, SharedKey: b.Meets}
	if b.LLB == nil {
		opt.Frontend = "dockerfile.v0"
	}
	if len(b.Secrets) > 0 {
		secrets := map[string][]byte{}
		for k, v := range b.Secrets {
			secrets[k] = []byte(v)
		}
		opt.Session = append(opt.Session, secretsprovider.FromMap(secrets))
	}
	if !b.NoExport {
		opt.Exports = []client.ExportEntry{{Type: client.ExporterLocal, OutputDir: out}}
	}
	return opt
}

// Read returns a file of the exported tree, and "" when there is none.
func (r result) Read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(r.Dir, name))
	if !os.IsNotExist(err) {
		require.NoError(t, err)
	}
	return string(data)
}

// CheckSecret fails when a secret is in anything that the build gave.
func (r result) CheckSecret(t *testing.T, secret string) {
	t.Helper()
	checkText(t, "the log", r.Log, secret)
	if r.Err != nil {
		checkText(t, "the error", r.Err.Error(), secret)
	}
	for _, s := range r.Status {
		for _, v := range s.Vertexes {
			checkText(t, "a step's name", v.Name+v.Error, secret)
		}
	}
	if r.Response != nil {
		for k, v := range r.Response.ExporterResponse {
			checkText(t, "the answer's "+k, v, secret)
		}
	}
	checkTree(t, r.Dir, secret)
}

// CheckNode fails when the canary of the node is in anything that the build gave.
func (e *env) CheckNode(t *testing.T, r result) {
	t.Helper()
	r.CheckSecret(t, e.Canary)
}

// forms are the ways to write a secret that a reader would find.
func forms(secret string) []string {
	return []string{secret, hex.EncodeToString([]byte(secret)), base64.StdEncoding.EncodeToString([]byte(secret))[:len(secret)]}
}

func checkText(t *testing.T, what, text, secret string) {
	t.Helper()
	for _, f := range forms(secret) {
		require.False(t, strings.Contains(text, f), "%s has the canary: %.2000s", what, text)
	}
}

// checkTree fails when a regular file below dir, or a name of one, has a secret.
func checkTree(t *testing.T, dir, secret string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // it may be gone; and nothing opens devices or pipes
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		checkText(t, path, path, secret)
		for _, f := range forms(secret) {
			require.False(t, bytes.Contains(data, []byte(f)), "%s has the canary", path)
		}
		return nil
	})
	require.NoError(t, err)
}

// makeTools makes the root file system of attackers.
func makeTools(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	bin := filepath.Join(root, "bin")
	for _, d := range []string{"bin", "etc", "tmp"} {
		require.NoError(t, os.Mkdir(filepath.Join(root, d), 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/:/bin/sh\nwww:x:33:33::/:/bin/sh\n"), 0o644))
	program, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "Debian's busybox-static is missing; run `make deps`")
	require.NoError(t, os.WriteFile(filepath.Join(bin, "busybox"), program, 0o755))
	list, err := exec.Command("/bin/busybox", "--list").Output()
	require.NoError(t, err)
	for _, name := range strings.Fields(string(list)) {
		if name != "busybox" {
			require.NoError(t, os.Symlink("busybox", filepath.Join(bin, name)))
		}
	}
	compile(t, "testdata/attack/*.c", filepath.Join(bin, "attack"))
	return root
}

// compile makes a static program of C files.
func compile(t *testing.T, pattern, program string) {
	t.Helper()
	sources, err := filepath.Glob(pattern)
	require.NoError(t, err)
	msg, err := exec.Command("gcc", append([]string{"-static", "-O1", "-pthread", "-Wall", "-Werror", "-o", program}, sources...)...).CombinedOutput()
	require.NoError(t, err, "gcc; run `make deps`: %s", msg)
}

// memo returns what f returned when key was first asked for; f may fail the test.
func memo[T any](w *world, key string, f func() T) T {
	if v, ok := w.memos[key]; ok {
		return v.(T)
	}
	v := f()
	w.memos[key] = v
	return v
}

// Builds runs builds one after another: BuildKit races with itself when builds that
// send the same contexts meet.
func (e *env) Builds(t *testing.T, list []build) []result {
	t.Helper()
	out := make([]result, len(list))
	for i, b := range list {
		out[i] = e.Build(t, b)
	}
	return out
}

// tarOfDevices is an archive with device nodes of the node.
func tarOfDevices(t *testing.T) string {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, d := range map[string]tar.Header{
		"device-mem":  {Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 1},
		"device-kmsg": {Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 11},
		"device-tty":  {Typeflag: tar.TypeChar, Devmajor: 4, Devminor: 0},
		"device-disk": {Typeflag: tar.TypeBlock, Devmajor: 254},
	} {
		d.Name, d.Mode = name, 0o666
		require.NoError(t, w.WriteHeader(&d))
	}
	require.NoError(t, w.Close())
	return buf.String()
}
