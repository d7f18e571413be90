package integration

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/test/registry"
)

// TestDockerfileFromURL has the Dockerfile fetched from a loopback server.
func TestDockerfileFromURL(t *testing.T) {
	n := newNode(t, "userns")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/d/My.Dockerfile" {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte("FROM scratch\nCOPY a /copied\n"))
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	dir := contextDir(t, "this is not the Dockerfile", map[string]string{"a": "from the context"})
	out := n.mustBuildTree(dir, "-f", "http://"+l.Addr().String()+"/d/My.Dockerfile")
	require.Equal(t, "from the context", read(t, out, "copied"))
	r := n.build(dir, "-f", "http://"+l.Addr().String()+"/missing")
	require.Equal(t, 1, r.code)
	require.Contains(t, r.stderr, "404")
}

// pushDigest builds dir, pushes the image and returns its name with digest.
func (n *node) pushDigest(dir, ref string, args ...string) string {
	n.t.Helper()
	meta := filepath.Join(n.t.TempDir(), "metadata.json")
	n.mustBuild(dir, append(args, "-t", ref, "--push", "--provenance=false", "--metadata-file", meta)...)
	var facts map[string]any
	require.NoError(n.t, json.Unmarshal([]byte(read(n.t, meta)), &facts))
	return ref + "@" + facts["containerimage.digest"].(string)
}

// TestSBOMGeneratorRunsAsAStep has a scanner of our own look at the result.
func TestSBOMGeneratorRunsAsAStep(t *testing.T) {
	reg := registry.Start(t, registry.Config{})
	inEachSandbox(t, func(t *testing.T, n *node) {
		scanner := n.pushDigest(contextDir(t, base+`COPY --chmod=755 scan /scan
ENTRYPOINT ["/scan"]
`, map[string]string{"scan": `#!/bin/sh
files=$(ls "$BUILDKIT_SCAN_SOURCE" | tr '\n' ' ')
cat > "$BUILDKIT_SCAN_DESTINATION/sbom.spdx.json" <<JSON
{"_type":"https://in-toto.io/Statement/v0.1","predicateType":"https://spdx.dev/Document","predicate":{"spdxVersion":"SPDX-2.3","name":"$files"}}
JSON
`}), reg+"/scanner-"+n.class+":1", withTools(t)...)
		layout := filepath.Join(t.TempDir(), "layout")
		n.mustBuild(contextDir(t, "FROM scratch\nCOPY found-by-scanner /\n", map[string]string{"found-by-scanner": "x"}),
			"--sbom", "generator="+scanner, "--output", "type=oci,tar=false,dest="+layout)
		require.Contains(t, spdxDocument(t, layout), "found-by-scanner")
	})
}

// spdxDocument returns the SPDX statement among the blobs of a layout.
func spdxDocument(t *testing.T, layout string) string {
	t.Helper()
	blobs, err := filepath.Glob(filepath.Join(layout, "blobs", "sha256", "*"))
	require.NoError(t, err)
	for _, b := range blobs {
		data, err := os.ReadFile(b)
		require.NoError(t, err)
		if strings.Contains(string(data), `"predicateType":"https://spdx.dev/Document"`) && strings.Contains(string(data), `"subject"`) {
			return string(data)
		}
	}
	t.Fatal("the layout has no SPDX statement")
	return ""
}

// TestListedFrontendRunsInASandbox builds with BuildKit's own front end as an
// external one.
func TestListedFrontendRunsInASandbox(t *testing.T) {
	reg := registry.Start(t, registry.Config{})
	program, err := os.ReadFile(bin("dockerfile-frontend"))
	require.NoError(t, err, "run `make test-tools`")
	inEachSandbox(t, func(t *testing.T, n *node) {
		dir := contextDir(t, `FROM scratch
COPY --chmod=755 frontend /bin/frontend
LABEL moby.buildkit.frontend.network.none="true"
ENTRYPOINT ["/bin/frontend"]
`, map[string]string{"frontend": string(program)})
		ref := n.pushDigest(dir, reg+"/frontend-"+n.class+":1")
		dir = contextDir(t, "# syntax="+ref+"\nFROM scratch\nCOPY a /by-frontend\n", map[string]string{"a": "a"})
		r := n.build(dir)
		require.Equal(t, 1, r.code)
		require.Contains(t, r.stderr, "is not allowed")
		out := n.mustBuildTree(dir, "--frontend", ref)
		require.Equal(t, "a", read(t, out, "by-frontend"))
	})
}
