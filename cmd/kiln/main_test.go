package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"
)

// scriptTimeout bounds one script.
const scriptTimeout = 3 * time.Minute

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kiln": main})
}

// TestScripts runs the command as a user does. Builds in the scripts are real
// ones, in sandboxes, with the OCI runtimes that `make build` makes.
func TestScripts(t *testing.T) {
	bin, err := filepath.Abs(filepath.Join("..", "..", "bin"))
	require.NoError(t, err)
	for _, name := range []string{"runc", "runsc"} {
		_, err := os.Stat(filepath.Join(bin, name))
		require.NoError(t, err, "run `make build` first")
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(e *testscript.Env) error {
			busybox, err := os.ReadFile("/bin/busybox")
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(e.WorkDir, "busybox"), busybox, 0o755); err != nil {
				return err
			}
			e.Setenv("KILN_RUNC", filepath.Join(bin, "runc"))
			e.Setenv("KILN_RUNSC", filepath.Join(bin, "runsc"))
			e.Setenv("DOCKER_CONFIG", filepath.Join(e.WorkDir, "docker"))
			e.Setenv("root", filepath.Join(e.WorkDir, "root"))
			return nil
		},
		Deadline: time.Now().Add(scriptTimeout),
	})
}
