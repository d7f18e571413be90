package program

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFind(t *testing.T) {
	exe, err := os.Executable()
	require.NoError(t, err)
	beside := filepath.Join(filepath.Dir(exe), "tool-of-the-test")
	other := t.TempDir()
	onPath := filepath.Join(other, "tool-of-the-test")
	t.Setenv("PATH", other)

	require.Empty(t, Find("", "tool-of-the-test"))
	require.NoError(t, os.WriteFile(onPath, nil, 0o755))
	require.Equal(t, onPath, Find("", "tool-of-the-test"))
	require.NoError(t, os.WriteFile(beside, nil, 0o644))
	defer os.Remove(beside)
	require.Equal(t, onPath, Find("", "tool-of-the-test"), "what cannot be executed is no program")
	require.NoError(t, os.Chmod(beside, 0o755))
	require.Equal(t, beside, Find("", "tool-of-the-test"))
	require.Equal(t, "/configured", Find("/configured", "tool-of-the-test"))
}

// A test has no list of modules; that of kiln-agent asks the real program for one.
func TestVersions(t *testing.T) {
	require.NotEmpty(t, Version())
	require.Empty(t, ModuleVersion("example.com/none"))
}
