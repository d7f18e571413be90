package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
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
// ones, in sandboxes, with the runsc that `make build` makes.
func TestScripts(t *testing.T) {
	bin, err := filepath.Abs(filepath.Join("..", "..", "bin"))
	require.NoError(t, err)
	_, err = os.Stat(filepath.Join(bin, "runsc"))
	require.NoError(t, err, "run `make build` first")
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
			e.Setenv("KILN_RUNSC", filepath.Join(bin, "runsc"))
			e.Setenv("DOCKER_CONFIG", filepath.Join(e.WorkDir, "docker"))
			registry, err := freeAddress()
			if err != nil {
				return err
			}
			e.Setenv("REGISTRY", registry)
			e.Defer(func() { endRegistry(t, e.WorkDir) })
			e.Setenv("root", filepath.Join(e.WorkDir, "root"))
			return nil
		},
		Deadline: time.Now().Add(scriptTimeout),
	})
}

// freeAddress returns a loopback address that nothing listens on.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// endRegistry ends the registry that a script started, if it did.
func endRegistry(t *testing.T, work string) {
	data, err := os.ReadFile(filepath.Join(work, "registry.pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	require.NoError(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	require.NoError(t, err)
	require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
}
