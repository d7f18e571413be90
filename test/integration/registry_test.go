package integration

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/test/registry"
)

// TestPushedImageRunsElsewhere pushes, pulls with skopeo, and starts the result
// with runc alone.
func TestPushedImageRunsElsewhere(t *testing.T) {
	reg := registry.Start(t, registry.Config{})
	n := newNode(t, "gvisor")
	ref := reg + "/team/app:1"
	n.mustBuild(contextDir(t, base+"RUN echo 'echo it runs' > /run.sh\nCMD [\"/bin/busybox\", \"sh\", \"/run.sh\"]\n", nil), append(withTools(t), "-t", ref, "--push")...)

	dir := t.TempDir()
	run := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).CombinedOutput()
		require.NoError(t, err, "%s %q: %s", name, args, out)
		return string(out)
	}
	run("skopeo", "copy", "--insecure-policy", "--src-tls-verify=false", "docker://"+ref, "oci:"+filepath.Join(dir, "layout")+":1")
	bundle := filepath.Join(dir, "bundle")
	rootfs := filepath.Join(bundle, "rootfs")
	require.NoError(t, os.MkdirAll(rootfs, 0o755))
	for _, l := range manifestLayers(t, filepath.Join(dir, "layout")) {
		run("tar", "-xf", l, "-C", rootfs)
	}
	run(bin("runc"), "spec", "--bundle", bundle)
	spec := read(t, bundle, "config.json")
	spec = strings.Replace(spec, `"terminal": true`, `"terminal": false`, 1)
	spec = strings.Replace(spec, "\"sh\"\n", "\"/bin/busybox\", \"sh\", \"/run.sh\"\n", 1)
	require.NoError(t, os.WriteFile(filepath.Join(bundle, "config.json"), []byte(spec), 0o644))
	require.Equal(t, "it runs\n", run(bin("runc"), "--root", filepath.Join(dir, "state"), "run", "--bundle", bundle, "elsewhere"))
}

func manifestLayers(t *testing.T, layout string) []string {
	t.Helper()
	var index struct{ Manifests []descriptor }
	unmarshal(t, []byte(read(t, layout, "index.json")), &index)
	var manifest struct {
		Layers    []descriptor
		Manifests []descriptor
	}
	unmarshal(t, blob(t, layout, index.Manifests[0].Digest), &manifest)
	if len(manifest.Manifests) > 0 {
		unmarshal(t, blob(t, layout, manifest.Manifests[0].Digest), &manifest)
	}
	var out []string
	for _, l := range manifest.Layers {
		out = append(out, filepath.Join(layout, "blobs", strings.ReplaceAll(l.Digest, ":", "/")))
	}
	return out
}

// TestCacheGoesThroughARegistryAndADirectory builds on one node and finds the
// steps cached on another.
func TestCacheGoesThroughARegistryAndADirectory(t *testing.T) {
	reg := registry.Start(t, registry.Config{})
	local := t.TempDir()
	dir := contextDir(t, base+"RUN echo expensive > /f\n", nil)
	tools := withTools(t)
	for name, cache := range map[string][2]string{
		"registry": {"type=registry,ref=" + reg + "/cache:1,mode=max", "type=registry,ref=" + reg + "/cache:1"},
		"local":    {"type=local,dest=" + local + ",mode=max", "type=local,src=" + local},
		"inline":   {"type=inline", "type=registry,ref=" + reg + "/inline:1"},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"--cache-to", cache[0]}, tools...)
			if name == "inline" {
				args = append(args, "-t", reg+"/inline:1", "--push")
			}
			newNode(t, "gvisor").mustBuild(dir, args...)
			// The image is asked for, so that inline cache, which has only the final
			// layers, is loaded.
			r := newNode(t, "userns").mustBuild(dir, append(tools, "--cache-from", cache[1], "-o", "type=oci,dest="+filepath.Join(t.TempDir(), "x.tar"))...)
			require.Contains(t, r.stderr, "CACHED")
			require.NotContains(t, r.stderr, "expensive > /f\n#"+" DONE")
		})
	}
}

func TestRegistryThatRefusesOrStallsOrTruncates(t *testing.T) {
	stop := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/v2/refuse/", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) })
	mux.HandleFunc("/v2/stall/", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-stop:
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/v2/truncate/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "{")
	})
	s := httptest.NewServer(mux)
	defer s.Close()
	defer close(stop)
	addr := s.Listener.Addr().(*net.TCPAddr).String()
	n := newNode(t, "gvisor")
	for _, kind := range []string{"refuse", "truncate"} {
		r := n.build(contextDir(t, "FROM "+addr+"/"+kind+"/image:1\nRUN true\n", nil))
		require.Equal(t, 1, r.code, kind)
		require.Contains(t, r.stderr, kind+"/image:1", "the error names the image")
		require.Contains(t, r.stderr, "Dockerfile:1", "and the line")
	}
	start := time.Now()
	r := n.interrupt(time.Second, contextDir(t, "FROM "+addr+"/stall/image:1\n", nil))
	require.NotZero(t, r.code)
	require.Less(t, time.Since(start), 10*time.Second)
	n.mustBuild(contextDir(t, "FROM scratch\nCOPY a /\n", map[string]string{"a": ""}))
}
