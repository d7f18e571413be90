package escape

import (
	"runtime"
	"strings"
	"testing"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(entry{
	ID: "exhaustion/dockerfile-growth", Severity: takesNodeDown, Once: noStep,
	Threat: "A Dockerfile of some lines doubles a variable until its value takes all memory of the agent.",
	Test:   dockerfileGrowth,
})

// dockerfileGrowth would have values of some 500 MB without the control, so that the
// machine survives.
func dockerfileGrowth(t *testing.T, e *env) {
	const grown = 200 << 20
	double := strings.Repeat("ENV A=$A$A\n", 25)
	long := hostile.NewImage([][]byte{program(t)}, func(config *ocispecs.Image, _ *ocispecs.Manifest) {
		config.Config.Env = []string{"A=" + strings.Repeat("x", 100_000)}
	})
	for name, b := range map[string]build{
		"doubled":                {Dockerfile: "FROM scratch\nENV A=0123456789abcdef\n" + double + "COPY Dockerfile /\n"},
		"of an argument":         {Dockerfile: "FROM scratch\nARG A\nENV B=" + strings.Repeat("$A", 5000) + "\nCOPY Dockerfile /\n", Args: map[string]string{"A": strings.Repeat("x", 100_000)}},
		"of a base image":        {Dockerfile: "FROM " + registryOf(t, e, long, nil).Address + "/image:latest\nENV B=" + strings.Repeat("$A", 5000) + "\n"},
		"in a trigger":           {Dockerfile: "FROM scratch AS base\nENV A=0123456789abcdef\n" + strings.Repeat("ONBUILD ENV A=$A$A\n", 25) + "FROM base\nCOPY Dockerfile /\n"},
		"with another front end": {Dockerfile: "# syntax=docker/dockerfile:1\nFROM scratch\nENV A=0123456789abcdef\n" + double + "COPY Dockerfile /\n"},
	} {
		b.NoExport = true
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		r := e.Build(t, b)
		runtime.ReadMemStats(&after)
		require.ErrorContains(t, r.Err, "would have more than 1MiB", name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(grown), name)
	}
	e.healthy(t)
}
