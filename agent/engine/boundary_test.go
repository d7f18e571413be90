package engine

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// clientPackages are the parts of BuildKit that clients are meant to import.
// Everything else is internal to a builder.
var clientPackages = []string{
	"api/", "client", "cmd/buildctl/build", "exporter/containerimage/exptypes", "frontend/dockerui", "frontend/gateway/client",
	"frontend/gateway/errdefs", "frontend/gateway/pb", "frontend/dockerfile/dfgitutil", "frontend/dockerfile/parser", "frontend/dockerfile/shell", "frontend/subrequests", "identity", "session", "solver/errdefs", "solver/llbsolver/provenance/types", "solver/pb", "sourcepolicy/pb", "util/", "version",
}

const module, buildkit = "github.com/kiln-build/kiln/", "github.com/moby/buildkit/"

// kilnPackage is a package of this module with what it and its tests import.
type kilnPackage struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

func kilnPackages(t *testing.T) []kilnPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", module+"...").Output()
	require.NoError(t, err)
	var all []kilnPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p kilnPackage
		if err := dec.Decode(&p); err == io.EOF {
			break
		} else {
			require.NoError(t, err)
		}
		all = append(all, p)
	}
	require.Greater(t, len(all), 8)
	return all
}

// TestOnlyThisPackageImportsBuilderInternals keeps the rest of kiln free of the
// parts of BuildKit that change without notice.
func TestOnlyThisPackageImportsBuilderInternals(t *testing.T) {
	for _, p := range kilnPackages(t) {
		if p.ImportPath == module+"agent/engine" {
			continue
		}
		for _, imp := range append(append(p.Imports, p.TestImports...), p.XTestImports...) {
			if rel, ok := strings.CutPrefix(imp, buildkit); ok && !isClientPackage(rel) {
				t.Errorf("%s imports BuildKit's internal package %s", p.ImportPath, rel)
			}
		}
	}
}

// TestLayersOfPackages keeps sandbox and snapshot apart from each other and from
// everything above them.
func TestLayersOfPackages(t *testing.T) {
	may := map[string][]string{"sandbox": {"sandbox"}, "snapshot": {"snapshot"}}
	for _, p := range kilnPackages(t) {
		rel := strings.TrimPrefix(p.ImportPath, module)
		top, _, _ := strings.Cut(rel, "/")
		allowed, ok := may[top]
		if !ok {
			continue
		}
		for _, imp := range p.Imports {
			if dep, ok := strings.CutPrefix(imp, module); ok {
				depTop, _, _ := strings.Cut(dep, "/")
				if !slices.Contains(allowed, depTop) {
					t.Errorf("%s imports %s", rel, dep)
				}
			}
		}
	}
}

func isClientPackage(rel string) bool {
	for _, p := range clientPackages {
		if rel == p || strings.HasPrefix(rel, strings.TrimSuffix(p, "/")+"/") {
			return true
		}
	}
	return false
}
