package engine

import (
	"encoding/json"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// clientPackages are the parts of BuildKit that clients are meant to import.
// Everything else is internal to a builder.
var clientPackages = []string{
	"api/", "client", "cmd/buildctl/build", "exporter/containerimage/exptypes", "frontend/dockerui", "frontend/gateway/client",
	"frontend/gateway/errdefs", "frontend/gateway/pb", "frontend/dockerfile/dfgitutil", "frontend/dockerfile/parser", "frontend/subrequests", "identity", "session", "solver/errdefs", "solver/llbsolver/provenance/types", "solver/pb", "sourcepolicy/pb", "util/", "version",
}

// TestOnlyThisPackageImportsBuilderInternals keeps the rest of kiln free of the
// parts of BuildKit that change without notice.
func TestOnlyThisPackageImportsBuilderInternals(t *testing.T) {
	const module, buildkit, self = "github.com/kiln-build/kiln/...", "github.com/moby/buildkit/", "github.com/kiln-build/kiln/agent/engine"
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", module).Output()
	require.NoError(t, err)
	dec := json.NewDecoder(strings.NewReader(string(out)))
	seen := 0
	for {
		var p struct {
			ImportPath                         string
			Imports, TestImports, XTestImports []string
		}
		if err := dec.Decode(&p); err == io.EOF {
			break
		} else {
			require.NoError(t, err)
		}
		if p.ImportPath == self {
			continue
		}
		seen++
		for _, imp := range append(append(p.Imports, p.TestImports...), p.XTestImports...) {
			if rel, ok := strings.CutPrefix(imp, buildkit); ok && !isClientPackage(rel) {
				t.Errorf("%s imports BuildKit's internal package %s", p.ImportPath, rel)
			}
		}
	}
	require.Greater(t, seen, 3)
}

func isClientPackage(rel string) bool {
	for _, p := range clientPackages {
		if rel == p || strings.HasPrefix(rel, strings.TrimSuffix(p, "/")+"/") {
			return true
		}
	}
	return false
}
