package strategy

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kiln-build/kiln/agent/engine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/mountns"
)

// buildTimeout bounds one build of a test.
const buildTimeout = 2 * time.Minute

func TestMain(m *testing.M) {
	if err := mountns.Enter(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// As in the agent: modes of directories are what a spec says.
	syscall.Umask(0)
	var lasting []goleak.Option
	for i := range 10 {
		// Threads that the gVisor sandbox keeps for the life of the process.
		lasting = append(lasting, goleak.IgnoreAnyFunction(fmt.Sprintf("github.com/kiln-build/kiln/sandbox/gvisor.init.func%d.1", i)))
	}
	goleak.VerifyTestMain(m, append(lasting,
		// The engine's own, which end with the process or some seconds after a build.
		goleak.IgnoreAnyFunction("github.com/moby/buildkit/solver.(*Job).Discard.func1"),
		goleak.IgnoreAnyFunction("github.com/moby/buildkit/control.NewController.After.throttle.func3.1"),
		goleak.IgnoreAnyFunction("github.com/moby/buildkit/solver/llbsolver/history.NewQueue.func2"),
		goleak.IgnoreAnyFunction("github.com/moby/buildkit/solver/llbsolver/history.NewQueue.func3"),
	)...)
}

// connect returns a client of an engine of the class with a state of its own.
func connect(t *testing.T, class sandbox.Class) *client.Client {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir())
	bin, err := filepath.Abs("../../bin")
	require.NoError(t, err)
	_, err = os.Stat(filepath.Join(bin, "runsc"))
	require.NoError(t, err, "run `make build` first")
	root := t.TempDir()
	ctx := context.Background()
	// Sources come as they do on a node.
	loopback, err := egress.ParseExceptions([]string{"127.0.0.1/32"})
	require.NoError(t, err)
	e, err := engine.New(ctx, engine.Config{
		NodeConfig: engine.NodeConfig{Root: root, Fetch: &egress.Policy{Exceptions: loopback}, RunscPath: filepath.Join(bin, "runsc")},
		Sandbox:    class,
	})
	require.NoError(t, err)
	c, err := e.Client(ctx)
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = c.Close()
		require.NoError(t, e.Close())
		require.Empty(t, mountsBelow(t, root), "something is left mounted")
	})
	return c
}

// mountsBelow lists the mount points of this process in a directory.
func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	var out []string
	for line := range strings.Lines(string(data)) {
		if point := strings.Fields(line)[4]; strings.HasPrefix(point, dir+"/") {
			out = append(out, point)
		}
	}
	return out
}

// outcome is how a build ended.
type outcome struct {
	response map[string]string
	// log is what steps wrote, and names those of all vertices.
	log, names string
	err, cause error
}

// run makes a plan and has it built.
func run(t *testing.T, c *client.Client, in Inputs) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	plan, err := New(ctx, in)
	require.NoError(t, err)
	defer plan.Close()
	status := make(chan *client.SolveStatus)
	done := make(chan struct{})
	var out outcome
	go func() {
		defer close(done)
		var log, names strings.Builder
		for s := range status {
			for _, v := range s.Vertexes {
				fmt.Fprintf(&names, "%s cached=%t %s\n", v.Name, v.Cached, v.Error)
			}
			for _, l := range s.Logs {
				log.Write(l.Data)
			}
		}
		out.log, out.names = log.String(), names.String()
	}()
	res, err := c.Build(ctx, plan.Opt, "kiln", plan.Build, status)
	<-done
	out.err, out.cause = err, plan.Cause()
	if res != nil {
		out.response = res.ExporterResponse
	}
	return out
}

func mustRun(t *testing.T, c *client.Client, in Inputs) outcome {
	t.Helper()
	out := run(t, c, in)
	require.NoError(t, out.err, out.log)
	return out
}

// testRegistry is a registry in this process.
type testRegistry struct {
	t    *testing.T
	host string
}

func newRegistry(t *testing.T) *testRegistry {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return &testRegistry{t, strings.TrimPrefix(s.URL, "http://")}
}

func (r *testRegistry) reference(image string) name.Reference {
	r.t.Helper()
	ref, err := name.ParseReference(image, name.Insecure)
	require.NoError(r.t, err)
	return ref
}

// entries are the files of an image by path: what is in them, or with "-> " before
// it the target of a symbolic link. A path that ends with a slash is a directory.
type entries map[string]string

func tarOf(t testing.TB, files entries) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, path := range sortedKeys(files) {
		content := files[path]
		h := &tar.Header{Name: path, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			h.Typeflag, h.Linkname, h.Size, content = tar.TypeSymlink, target, 0, ""
		} else if strings.HasSuffix(path, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		} else if strings.HasPrefix(path, "bin/") {
			h.Mode = 0o755
		}
		require.NoError(t, w.WriteHeader(h))
		_, err := io.WriteString(w, content)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return buf.Bytes()
}

// push makes an image of files and pushes it.
func (r *testRegistry) push(repo string, files entries, change func(*v1.Config)) string {
	r.t.Helper()
	data := tarOf(r.t, files)
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
	require.NoError(r.t, err)
	image, err := mutate.AppendLayers(empty.Image, layer)
	require.NoError(r.t, err)
	file, err := image.ConfigFile()
	require.NoError(r.t, err)
	file.OS, file.Architecture = "linux", "amd64"
	if change != nil {
		change(&file.Config)
	}
	image, err = mutate.ConfigFile(image, file)
	require.NoError(r.t, err)
	ref := r.host + "/" + repo
	require.NoError(r.t, remote.Write(r.reference(ref), image))
	return ref
}

// pushBusybox pushes an image with a shell and the tools of busybox.
func (r *testRegistry) pushBusybox(change func(*v1.Config)) string {
	r.t.Helper()
	data, err := os.ReadFile("/bin/busybox")
	require.NoError(r.t, err, "Debian's busybox-static is missing; run `make deps`")
	files := entries{
		"bin/busybox": string(data), "etc/passwd": "root:x:0:0::/:/bin/sh\nbuilder:x:1001:1001::/:/bin/sh\n",
		"etc/group": "root:x:0:\nbuilder:x:1001:\n", "tmp/": "",
	}
	for _, tool := range strings.Fields("sh cat echo env id ls mkdir pwd sleep stat test touch grep cp chmod chown rm wc find sort true false") {
		files["bin/"+tool] = "-> busybox"
	}
	return r.push("busybox:1", files, func(c *v1.Config) {
		c.Env = []string{"PATH=/bin", "FROM_IMAGE=image"}
		c.Entrypoint = []string{"/bin/sh", "-c"}
		c.Cmd = []string{"echo image command"}
		if change != nil {
			change(c)
		}
	})
}

// pulled is an image as a registry has it.
type pulled struct {
	files   entries
	headers map[string]*tar.Header
	config  v1.ConfigFile
	image   v1.Image
}

// pull returns an image with its files.
func (r *testRegistry) pull(ref string) pulled {
	r.t.Helper()
	image, err := remote.Image(r.reference(ref), remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
	require.NoError(r.t, err)
	out := pulled{files: entries{}, headers: map[string]*tar.Header{}, image: image}
	config, err := image.ConfigFile()
	require.NoError(r.t, err)
	out.config = *config
	rc := mutate.Extract(image)
	defer rc.Close()
	tr := tar.NewReader(rc)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		require.NoError(r.t, err)
		path := strings.TrimPrefix(filepath.Clean("/"+h.Name), "/")
		out.headers[path] = h
		switch h.Typeflag {
		case tar.TypeReg:
			data, err := io.ReadAll(tr)
			require.NoError(r.t, err)
			out.files[path] = string(data)
		case tar.TypeSymlink:
			out.files[path] = "-> " + h.Linkname
		}
	}
}

// pushTo is an output into a registry.
func pushTo(image string) []*agentv1.Output {
	return []*agentv1.Output{{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: image}}}}
}

func inlineSource(files map[string]string) *agentv1.Source {
	src := &agentv1.InlineSource{}
	for _, path := range sortedKeys(files) {
		src.Files = append(src.Files, &agentv1.InlineFile{Path: path, Content: []byte(files[path])})
	}
	return &agentv1.Source{From: &agentv1.Source_Inline{Inline: src}}
}

func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
