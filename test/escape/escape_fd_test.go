package escape

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var _ = register(
	entry{
		ID: "escape/fd-workdir", Threat: "A step's working directory is /proc/self/fd/N, to start in a directory that the runtime left open.",
		Severity: escapesToNode, Test: fdWorkdir,
	},
	entry{
		ID: "escape/fd-allow-list", Threat: "A step uses descriptors that the runtime or the agent left to it.",
		Severity: escapesToNode, Test: fdAllowList,
	},
)

// fdWorkdir tries all descriptors in one build: each stage fails or runs in a
// directory of its own.
func fdWorkdir(t *testing.T, e *env) {
	for n := 3; n < 12; n++ {
		r := e.Build(t, build{Dockerfile: fmt.Sprintf("FROM tools\nWORKDIR /proc/self/fd/%d\nRUN cat ../../../../../../../..%s; pwd; ls -la . .. ; exit 0\n", n, e.CanaryFile)})
		e.CheckNode(t, r)
	}
}

func fdAllowList(t *testing.T, e *env) {
	r := e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN [\"/bin/attack\", \"fds\"]\n"})
	var got []string
	for line := range strings.Lines(r.Log) {
		got = append(got, strings.Fields(line)[1])
	}
	require.Equal(t, []string{"0", "1", "2"}, got, r.Log)
}
