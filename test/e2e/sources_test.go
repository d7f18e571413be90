package e2e

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// makeSources makes a directory with a bare git repository, repo.git, whose
// directory app is a context, and an archive with another context.
func makeSources(t *testing.T, in *installation) (dir, archive, digest string) {
	t.Helper()
	dir = t.TempDir()
	work := t.TempDir()
	app := filepath.Join(work, "app")
	require.NoError(t, os.Mkdir(app, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(app, "file"), []byte("from-git"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(app, "Dockerfile"), []byte(in.dockerfile("grep from-git /src/file")), 0o644))
	bare := filepath.Join(dir, "repo.git")
	for _, args := range [][]string{
		{"-C", work, "init", "-q", "-b", "main"},
		{"-C", work, "add", "."},
		{"-C", work, "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-q", "-m", "first"},
		{"clone", "-q", "--bare", work, bare},
		{"-C", bare, "update-server-info"},
	} {
		out, err := exec.Command("git", args...).CombinedOutput()
		require.NoError(t, err, string(out))
	}
	archive = "context.tar.gz"
	f, err := os.Create(filepath.Join(dir, archive))
	require.NoError(t, err)
	zip := gzip.NewWriter(f)
	tw := tar.NewWriter(zip)
	for name, content := range map[string]string{"file": "from-http", "Dockerfile": in.dockerfile("grep from-http /src/file")} {
		require.NoError(t, tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}))
		_, err := tw.Write([]byte(content))
		require.NoError(t, err)
	}
	require.NoError(t, tw.Close())
	require.NoError(t, zip.Close())
	require.NoError(t, f.Close())
	data, err := os.ReadFile(f.Name())
	require.NoError(t, err)
	sum := sha256.Sum256(data)
	return dir, archive, "sha256:" + hex.EncodeToString(sum[:])
}
